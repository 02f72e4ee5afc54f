"""Inputs of attention, attention written as a softmax, and a counter of operators, for the tests of attention."""

import torch

BATCH, LENGTH, TEXT, HEADS, WIDTH = 2, 9, 5, 3, 16


def tensors(*lengths, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(BATCH, n, HEADS, WIDTH, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
        for n in lengths
    ]


def text_mask():
    return torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def joint_inputs(dtype=torch.float64):
    return tensors(*[LENGTH] * 3, *[TEXT] * 3, dtype=dtype)


def count_attention_ops(function):
    """{attention operator: how often it runs} in a second call of `function`.

    The profiler also sees the operators inside compiled code and inside our own operator.
    """
    function()  # compiles
    with torch.profiler.profile() as profile:
        function()
    return {
        e.key: e.count
        for e in profile.key_averages()
        if "attention" in e.key and e.key.startswith(("aten::", "titan_video::"))
    }


def attention_by_softmax(q, k, v, keys=None):
    scores = torch.einsum("blhk,bshk->bhls", q, k) * WIDTH**-0.5
    if keys is not None:
        scores = scores.masked_fill(~keys[:, None, None], -torch.inf)
    return torch.einsum("bhls,bshk->blhk", scores.softmax(-1), v)


def joint_attention_by_softmax(q, k, v, text_q, text_k, text_v, mask, seq_len):
    keys = torch.ones(BATCH, seq_len, dtype=torch.bool)
    keys = torch.cat([keys, mask], dim=1)
    out = attention_by_softmax(
        torch.cat([q, text_q], 1), torch.cat([k[:, :seq_len], text_k], 1), torch.cat([v[:, :seq_len], text_v], 1), keys
    )
    return out[:, :LENGTH], out[:, LENGTH:]


def loss(*outputs):
    return sum((x * torch.arange(x.numel(), dtype=x.dtype).view_as(x).cos()).sum() for x in outputs)


def pretend_gpu(monkeypatch, capability, deterministic=False):
    """Answer what `attention.set_backend` asks of a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
