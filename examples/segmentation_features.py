"""A feature map from a pooled model: inside the blocks there are fewer tokens, outside every place has its vector.

python examples/segmentation_features.py
"""

import torch
from transformers import Dinov2Config, Dinov2Model

import tokenpool_ext as tp


def main():
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=8, num_attention_heads=4, image_size=112, patch_size=14)
    model = Dinov2Model(config).eval()
    images = torch.randn(1, 3, 112, 112)

    with torch.inference_mode():
        whole = model(images).last_hidden_state[:, 1:]  # (1, 64, 64): one vector a patch
        tp.patch(model, keep_ratio=0.7)
        pooled = model(images).last_hidden_state[:, 1:]
    feature_map = pooled.transpose(1, 2).unflatten(2, (8, 8))
    cosine = torch.nn.functional.cosine_similarity(whole, pooled, dim=-1).mean()
    print("feature map", tuple(feature_map.shape), f"cosine to the unpooled one {cosine:.3f}")


if __name__ == "__main__":
    main()
