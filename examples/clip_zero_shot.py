"""CLIP from transformers with a pooled image tower: zero-shot scores before and after.

    python examples/clip_zero_shot.py

The weights are random, so the scores mean nothing here; load a checkpoint with CLIPModel.from_pretrained(...) instead.
"""

import torch
from transformers import CLIPConfig, CLIPModel

import tokenpool_ext as tp


def main():
    torch.manual_seed(0)
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    image = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, image_size=64)
    config = CLIPConfig(text_config=text, vision_config={**image, "patch_size": 8}, projection_dim=32)
    model = CLIPModel(config).eval()

    inputs = dict(input_ids=torch.randint(3, 90, (3, 6)), pixel_values=torch.randn(2, 3, 64, 64))
    with torch.inference_mode():
        before = model(**inputs).logits_per_image.softmax(1)
        tp.patch(model.vision_model, keep_ratio=0.7)
        after = model(**inputs).logits_per_image.softmax(1)
    print("probability of each text, all tokens\n", before, "\npooled\n", after)


if __name__ == "__main__":
    main()
