"""What the studies of bench/evidence stand on: intervals, budgets, and attention as a Gaussian filter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def test_attention_is_a_gaussian_filter_of_the_values_for_keys_of_one_norm():
    """softmax(q.k / sqrt(d)) v = normalised sum of exp(-|q - k|^2 / (2 sqrt(d))) v when |k| is constant; for other
    keys after adding |k|^2 / (2 sqrt(d)) to the logits."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(50, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    root = 16**0.5

    def errors(k):
        gaussian = torch.exp(-torch.cdist(q, k).square() / (2 * root))
        gaussian = gaussian / gaussian.sum(1, keepdim=True)
        logits = q @ k.T / root
        plain, mended = logits.softmax(1), (logits - k.square().sum(1) / (2 * root)).softmax(1)
        assert (mended @ v - gaussian @ v).abs().max() < 1e-13
        return (plain - gaussian).abs().max()

    unit = 4 * torch.nn.functional.normalize(k, dim=1)
    assert errors(unit) < 1e-14
    assert errors(unit * torch.linspace(0.5, 1.5, 50, dtype=torch.float64)[:, None]) > 0.01


def test_keep_ratios_meet_the_budget():
    from bench.evidence import methods

    for position in ("attention", "block"):
        whole = methods.macs(1.0, 256, 384, position)
        for budget in methods.BUDGETS:
            ratio = methods.ratio_for(budget, 256, 384, position)
            assert methods.macs(ratio, 256, 384, position) / whole == pytest.approx(budget, abs=0.01)
    # 12 blocks of 257 tokens of 384 features: 12 N M^2 + 2 N^2 M each
    assert methods.macs(1.0, 256, 384) == 12 * (12 * 257 * 384**2 + 2 * 257**2 * 384)


def test_bootstrap_interval():
    data = pytest.importorskip("bench.evidence.data")
    n = 400
    differences = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    low, high = data.interval(differences)
    mean, half = differences.mean().item(), 1.96 * differences.std().item() / n**0.5
    assert low == pytest.approx(mean - half, abs=0.01) and high == pytest.approx(mean + half, abs=0.01)
    assert data.interval(torch.zeros(5)) == (0.0, 0.0)


def test_every_table_and_figure_is_what_the_records_make():
    pytest.importorskip("matplotlib")
    pytest.importorskip("skimage")
    from bench.evidence import report

    text = "\n".join(report.pages().values())
    assert report.stale(text) == []
    assert report.stale(text.replace("| deit-ti | 1.254 |", "| deit-ti | 1.255 |")) == ["table cost"]


def test_relative_errors():
    from bench.evidence import capture

    x = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    w = torch.rand(2, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centers = x[:, :7] + 0.1
    nearest = torch.cdist(x, centers).square().amin(2)
    for weights, found in zip((torch.ones_like(w), w), capture.relative_errors(x, centers, (None, w))):
        mean = (weights[:, :, None] * x).sum(1, keepdim=True) / weights.sum(1)[:, None, None]
        expected = (weights * nearest).sum(1) / (weights * (x - mean).square().sum(2)).sum(1)
        torch.testing.assert_close(found, expected)
    means = x.mean(1, keepdim=True)
    torch.testing.assert_close(capture.relative_errors(x, means, (None,))[0], torch.ones(2, dtype=torch.float64))


def test_first_picks_for_many_clusters_are_those_for_few():
    pytest.importorskip("skimage")
    from bench.evidence import reconstruction

    x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    w = torch.rand(2, 40, generator=torch.Generator().manual_seed(1))
    for start in reconstruction.NESTED:
        for weights in (None, w):
            many = reconstruction.begin(x, 30, weights, start)
            assert torch.equal(many[:, :7], reconstruction.begin(x, 7, weights, start)), start


def test_reciprocal_ranks():
    pytest.importorskip("skimage")
    from bench.evidence.text import reciprocal_ranks

    gallery = torch.eye(4)
    queries = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.5, 0.6, 0.0]])
    assert reciprocal_ranks(queries, gallery, gallery[:2]).tolist() == [1.0, 0.5]
    # the document itself in its unpooled form is no rival
    assert reciprocal_ranks(queries, gallery, 0.5 * gallery[:2]).tolist() == [1.0, 0.5]
    assert reciprocal_ranks(queries, gallery, 0.0 * gallery[:2]).tolist()[0] == 0.5


def test_word_errors():
    pytest.importorskip("skimage")
    from bench.evidence.speech import edits, words

    said = words("It's a plain, small Test.")
    assert said == ["its", "a", "plain", "small", "test"]
    assert edits(said, said) == 0
    assert edits(said, []) == edits([], said) == 5
    assert edits(said, ["its", "plain", "tall", "test", "too"]) == 3  # one left out, one changed, one added
    assert edits(["a", "b"], ["b", "a"]) == 2


@pytest.fixture(scope="module")
def tiny_whisper():
    pytest.importorskip("skimage")
    transformers = pytest.importorskip("transformers")
    shape = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 50400, "max_target_positions": 16}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**shape)).eval()


@torch.inference_mode()
def test_greedy_decoding_takes_the_likeliest_token_each_time(tiny_whisper):
    from bench.evidence.whisper import NO_TIMESTAMPS, START, transcribe

    hidden = torch.randn(2, 9, 16)
    free = transcribe(tiny_whisper, hidden, 3)
    banned = [*free[:, 0].tolist()], [*free[:, 1].tolist()]
    found = transcribe(tiny_whisper, hidden, 8, banned)
    assert found.shape == (2, 8)
    prompt = torch.tensor([[START, NO_TIMESTAMPS]]).expand(2, 2)
    logits = tiny_whisper(decoder_input_ids=torch.cat([prompt, found], 1), encoder_outputs=(hidden,)).logits[:, 1:-1]
    logits[:, :, banned[0]] = -torch.inf
    logits[:, 0, banned[1]] = -torch.inf
    assert torch.equal(logits.argmax(2), found)
    assert not torch.equal(found[:, :3], free)


def test_greedy_decoding_ends_with_the_last_clip():
    pytest.importorskip("skimage")
    from bench.evidence.whisper import END, transcribe

    said = iter(torch.tensor([[5, 5], [END, 6], [9, END], [3, 3]]))

    def model(**_):
        logits = torch.nn.functional.one_hot(next(said), END + 1).float()[:, None]
        return SimpleNamespace(logits=logits, past_key_values=None)

    assert transcribe(model, torch.zeros(2, 1, 1), 8).tolist() == [[5, END, END], [5, 6, END]]


@torch.inference_mode()
def test_encoders_of_the_speech_study(tiny_whisper):
    from bench.evidence import speech, whisper

    mel, encoder = torch.randn(1, 80, 3000), tiny_whisper.model.encoder
    whole = encoder(mel).last_hidden_state
    for method, tokens, _ in speech.variants("padded", 1.0):
        if tokens in (250, 1500):
            found = speech.encoder_for(encoder, method, tokens, 1.0, 300)(mel).last_hidden_state
            assert found.shape[1] == (1500 if method.endswith("full") else tokens), method
            assert torch.equal(found, whole) == (method == "all tokens"), method
    assert torch.equal(whisper.trimmed(encoder, 1500)(mel).last_hidden_state, whole)
    assert whisper.trimmed(encoder, 300)(mel[:, :, :600]).last_hidden_state.shape == (1, 300, 16)
    assert torch.equal(encoder(mel).last_hidden_state, whole)  # copies leave it alone


def test_speech_records():
    pytest.importorskip("skimage")
    from bench.evidence import speech

    batch = {"words": [10, 30], "tokens": 1500, "encoder": 4.0, "decoder": 2.0}
    grid = ("grid", 250, 0.0)
    found = {speech.ALL: [{**batch, "errors": [1, 1]}], grid: [{**batch, "errors": [3, 7]}]}
    whole, pooled = speech.records("dense", found)
    assert whole["wer"] == 0.05 and "minus_all" not in whole
    assert (pooled["wer"], pooled["minus_all"], pooled["encoder_ms"]) == (0.25, 0.2, 4.0)
    assert pooled["minus_all_95"] == [0.1, 0.3]
    found[speech.ALL].append({**batch, "errors": [9, 9]})  # of clips the grid did not get
    whole, pooled = speech.records("dense", found)
    assert (whole["clips"], whole["wer"]) == (4, 0.25) and (pooled["clips"], pooled["minus_all"]) == (2, 0.2)
