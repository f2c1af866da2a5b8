"""Fine-tuning with pooling in the model: gradients flow through the cluster centers to every token.

    python examples/fine_tune.py [--steps 80]

The task is made up so that it runs anywhere: which of four corners of the picture is bright?
"""

import argparse

import torch
from torch import nn

import tokenpool_ext as tp


class SmallViT(nn.Module):
    """16 x 16 pixels in patches of 2: 64 tokens and a class token; half of the tokens are pooled after two blocks."""

    def __init__(self, dim=48, classes=4):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 65, dim) * 0.02)
        block = dict(d_model=dim, nhead=4, dim_feedforward=2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.first = nn.TransformerEncoder(nn.TransformerEncoderLayer(**block), 2, enable_nested_tensor=False)
        self.pool = tp.TokenPooling(keep_ratio=0.5)  # no parameters; the class token passes through
        self.last = nn.TransformerEncoder(nn.TransformerEncoderLayer(**block), 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.last(self.pool(self.first(x)))[:, 0])


def batch(size, generator):
    """Noise with one bright corner, and the number of that corner."""
    labels = torch.randint(4, (size,), generator=generator)
    images = torch.randn(size, 1, 16, 16, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 8 * (label // 2), 8 * (label % 2)
        image[:, row : row + 8, column : column + 8] += 3
    return images, labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = SmallViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(args.steps):
        images, labels = batch(32, generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            model.pool.keep_ratio = max(0.25, model.pool.keep_ratio - 0.05)  # may change while training
            print(f"step {step}: loss {loss.item():.3f}, keep ratio {model.pool.keep_ratio:.2f}")

    images, labels = batch(200, generator)
    with torch.inference_mode():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.2f} with {model.pool.tokens_kept(64)} of 64 tokens")


if __name__ == "__main__":
    main()
