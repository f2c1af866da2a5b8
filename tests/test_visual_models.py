"""examples/compress_vlm.py: models of transformers with fewer visual tokens, batches of two prompts."""

import sys

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent.parent / "examples"))
import compress_vlm

NAMES = list(compress_vlm.MODELS)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_all_tokens_kept_changes_nothing_and_a_quarter_shrinks_prompt_and_cache(name):
    model, inputs = compress_vlm.build(name)
    extra = {"position_ids": compress_vlm.rope_positions(model.model, inputs)} if name == "Qwen2.5-VL" else {}
    expected = model(**inputs, **extra, use_cache=True)
    same = compress_vlm.prefill(model, inputs, 1.0)
    torch.testing.assert_close(same.logits, expected.logits, rtol=0, atol=1e-4)
    out = compress_vlm.prefill(model, inputs, 0.25)
    visual = int((inputs["input_ids"][0] == compress_vlm.IMAGE).sum())
    length = inputs["input_ids"].shape[1] - visual + visual // 4
    assert out.logits.shape[:2] == (2, length) and torch.isfinite(out.logits).all()
    full, kept = (compress_vlm.cache_bytes(o.past_key_values) for o in (expected, out))
    assert kept * inputs["input_ids"].shape[1] == full * length
