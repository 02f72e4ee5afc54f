"""How many bytes context parallel sends: closed forms, equal to what the tests count.

One Traffic is what one rank sends to others in one attention core, in one direction (forward or backward), by one kind
of collective.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    collective: str  # "all_to_all", "all_gather" or "reduce_scatter"
    calls: int
    sent: int  # bytes, all calls together


def ulysses_traffic(
    q_elements: int, degree: int, itemsize: int, text_elements: int = 0
) -> tuple[list[Traffic], list[Traffic]]:
    """(forward, backward). q_elements: B L H K, of this rank's q; text_elements: B S H K, where video and text attend
    jointly.

    q, k and v go in one exchange, the output in another; of each, 1 / degree stays. Backward sends the same the other
    way.
    Of the text, only the output is sent: a rank's heads of it to all others; backward, each rank's part of their
        gradient.
    """
    exchange = Traffic("all_to_all", 2, 4 * q_elements * itemsize * (degree - 1) // degree)
    text = text_elements * itemsize * (degree - 1) // degree
    return [exchange, *([Traffic("all_gather", 1, text)] if text else [])], [
        exchange,
        *([Traffic("reduce_scatter", 1, text)] if text else []),
    ]


def ring_traffic(kv_elements: int, degree: int, itemsize: int, rotate: str) -> tuple[list[Traffic], list[Traffic]]:
    """(forward, backward). kv_elements: B S H K, of this rank's k: under Ulysses of the exchanged one, which is as
    large.

    Forward, a chunk of k and v passes degree - 1 times. Backward, so does it again, and so does its gradient, in
    float32 (float64 for float64).
    """
    chunk, steps = 2 * kv_elements, degree - 1
    sum_size = max(itemsize, 4)
    if rotate == "allgather":
        gather = Traffic("all_gather", 1, steps * chunk * itemsize)
        return [gather], [gather, Traffic("reduce_scatter", 1, steps * chunk * sum_size)]
    forward = Traffic("all_to_all", steps, steps * chunk * itemsize)
    return [forward], [Traffic("all_to_all", 2 * steps, steps * chunk * (itemsize + sum_size))]


def exchange_bytes(
    q_elements: int, ring: int, ulysses: int, itemsize: int, rotate: str = "alltoall", text_elements: int = 0
) -> tuple[int, int]:
    """Bytes that a rank sends in one attention core, (forward, backward).

    q_elements: B L H K of this rank's slice, L after tensor parallel's gather and H its part of the heads.
        text_elements: as in `ulysses_traffic`.
    """
    exchange = ulysses_traffic(q_elements, ulysses, itemsize, text_elements) if ulysses > 1 else ([], [])
    rounds = ring_traffic(q_elements, ring, itemsize, rotate) if ring > 1 else ([], [])
    forward, backward = (sum(part.sent for part in [*a, *b]) for a, b in zip(exchange, rounds, strict=True))
    return forward, backward
