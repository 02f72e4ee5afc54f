"""The optional attention backends: values and block masks of FlexAttention, packages of FlashAttention 3 and 4."""

import pytest
import torch

from tests.attention_cases import attention_by_softmax, joint_attention_by_softmax, joint_inputs, pretend_gpu, text_mask
from titan_video.kernels import attention, attention_backends, sdpa
from titan_video.models.hunyuan_video.blocks import JointInnerAttention
from titan_video.models.layers import InnerAttention
from titan_video.models.spec import StepLayout

CUDA = torch.device("cuda")


def test_block_mask_has_the_blocks_with_visible_keys():
    lengths = torch.tensor([[300], [256], [1]])
    blocks = attention_backends.key_block_mask(torch.arange(300).expand(3, -1) < lengths, 200)
    assert blocks.to_dense()[:, 0].tolist() == [[[1, 1, 1]] * 2, [[1, 1, 0]] * 2, [[1, 0, 0]] * 2]
    assert blocks.full_kv_num_blocks[:, 0, 0].tolist() == [2, 2, 0]  # the last block of 300 keys is not a full one
    assert blocks.kv_indices[2, 0, 0, 0] == 0 and blocks.kv_indices[0, 0, 0, 0] == 2
    assert blocks.seq_lengths == (200, 300)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_ignores_masked_keys(monkeypatch):
    """Forward only, because flex has no backward on a CPU; not compiled, from the same mask."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention_backends, "_compiled_flex", flex_attention)
    monkeypatch.setattr(attention, "_order", ("flex",))
    with torch.no_grad():
        inputs = [x.detach() for x in joint_inputs(torch.float32)]
        results = JointInnerAttention()(*inputs, text_mask(), StepLayout(seq_len=7))
        expected = joint_attention_by_softmax(*inputs, text_mask(), 7)
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        q, k, v = inputs[:3]
        torch.testing.assert_close(InnerAttention()(q, k, v), attention_by_softmax(q, k, v))


@pytest.fixture
def restored_choice(monkeypatch):
    monkeypatch.setattr(attention, "_order", ())


@pytest.mark.parametrize("name, implementation", [("flash3", "FA3"), ("flash4", "FA4")])
def test_a_flash_package_is_activated_and_called_as_torch_flash_attention(
    monkeypatch, restored_choice, name, implementation
):
    activated = []
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(attention_backends, "find_spec", lambda package: True)
    monkeypatch.setattr(attention_backends, "activate_flash_attention_impl", activated.append)
    assert attention.set_backend(name, CUDA, torch.bfloat16, 128) == name
    assert activated == [implementation]
    assert attention._kernels(name, CUDA) == (sdpa.flash, sdpa.flash_backward)


def test_a_flash_package_that_this_gpu_or_installation_lacks_is_refused(monkeypatch, restored_choice):
    pretend_gpu(monkeypatch, (8, 0))
    refusal = (
        r"flash3, but it does not run on this GPU \(a GPU\); legal here: auto, cudnn, flash, efficient, flex, math$"
    )
    with pytest.raises(ValueError, match=refusal):
        attention.set_backend("flash3", CUDA, torch.bfloat16, 128)
    pretend_gpu(monkeypatch, (9, 0))
    with pytest.raises(ValueError, match="flash3, but the package flash_attn_interface is not installed"):
        attention.set_backend("flash3", CUDA, torch.bfloat16, 128)
    monkeypatch.setattr(attention_backends, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="flash4, but the package flash_attn does not work here .*No module"):
        attention.set_backend("flash4", CUDA, torch.bfloat16, 128)
