"""search_schedule: the budget is kept, the dynamic program is exact; learn_schedule; the model is left as it was."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_vit
from torch import nn

import tokenpool_ext as tp
from tokenpool_ext import learn_schedule, search_schedule
from tokenpool_ext.cost import cost
from tokenpool_ext.vit import patched_blocks
from tokenpool_ext.vit.learn import SoftExtract
from tokenpool_ext.vit.search import _Search, cheapest, least_cost, steps_of, thinned

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = (12, 8, 4, 1)  # of 16: few, so that it is fast


def build(**extra) -> nn.Module:
    return tiny_vit("vit", **extra)


@pytest.fixture
def images():
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def share(model, images, counts, whole, **options) -> float:
    tp.patch(model, num_tokens=counts, **options)
    try:
        return cost(model, images).total / whole
    finally:
        tp.unpatch(model)


def one_step_more(counts):
    """The schedules in which one block keeps the next larger count, or pools no more."""
    before = 16
    for i, count in sorted(counts.items()):
        larger = min(n for n in (*COUNTS, 16) if n > count)
        yield {**counts, i: larger} if larger < before else {k: n for k, n in counts.items() if k != i} or {i: 16}
        before = count


@pytest.mark.parametrize("options", [{}, {"pooling": "bipartite", "position": "attention"}, {"layers": [1, -1]}])
def test_the_budget_is_kept(images, options, monkeypatch):
    # Which count loses most is chance in a random model. Here every token lost counts the same.
    monkeypatch.setattr(_Search, "loss", lambda self, counts: float(sum(self.n - n for n in counts.values())))
    model = build()
    layers = options.pop("layers", None)
    whole = cost(model, images).total
    for budget in (0.9, 0.7, 0.6):
        if layers and budget < 0.9:
            continue
        given = {"budget": budget, "layers": layers, "counts": COUNTS, **options}
        found = search_schedule(model, [images], **given)
        assert share(model, images, found, whole, **options) <= budget
        for more in one_step_more(found):
            assert share(model, images, more, whole, **options) > 0.999 * budget, "it would lose less, and be within"
        assert set(found) <= set(range(4) if layers is None else (1, 3))


def test_the_whole_budget_pools_nothing(images):
    model = build()
    plain = model(images).logits
    found = search_schedule(model, [images], budget=1.0, counts=COUNTS)
    assert torch.equal(tp.patch(model, num_tokens=found)(images).logits, plain)


def test_found_for_the_given_counts(images):
    found = search_schedule(build(), [images], budget=0.7, counts=[12, 5, 99])
    assert found and set(found.values()) <= {12, 5}
    assert found == search_schedule(build(), [images], budget=0.7, counts=[12, 5, 99]), "deterministic"


def test_the_dynamic_program_is_brute_force():
    generator = torch.Generator().manual_seed(0)
    size, depth = 3, 4
    for limit in (6, 9, 14, 30):
        for _ in range(10):
            losses = torch.rand(depth, size, size, generator=generator, dtype=torch.float64)
            costs = torch.randint(0, 6, (depth, size, size), generator=generator)
            losses[2, 0, 1] = torch.inf
            losses.masked_fill_(torch.ones(size, size).tril(-1).bool(), torch.inf)
            sums = {}
            for path in itertools.product(range(size), repeat=depth):
                steps = list(zip(range(depth), (0, *path), path))
                sums[path] = (sum(losses[s].item() for s in steps), sum(costs[s].item() for s in steps))
            allowed = {path: loss for path, (loss, c) in sums.items() if c <= limit and loss < torch.inf}
            least = min(c for loss, c in sums.values() if loss < torch.inf)
            assert least_cost(losses, costs) == least
            path = cheapest(losses, costs, limit)
            if not allowed:
                assert path is None and limit < least
                continue
            assert allowed[tuple(path)] == pytest.approx(min(allowed.values()), abs=1e-12)


def test_of_equal_losses_the_least_cost():
    losses, costs = torch.zeros(2, 3, 3, dtype=torch.float64), torch.tensor([[5, 5, 6], [5, 4, 4], [5, 3, 3]])
    assert cheapest(losses, torch.stack([costs, costs]), 10) == [1, 1]


def test_pooled_where_it_is_harmless(images):
    """Behind block 1 attention adds nothing, so the class token cannot tell what happened to the others."""
    model = build()
    with torch.no_grad():
        for layer in (2, 3):
            for parameter in model.vit.layers[layer].attention.o_proj.parameters():
                parameter.zero_()
    plain = model(images).logits
    found = search_schedule(model, [images], budget=0.8, counts=COUNTS)
    assert list(found) == [1]
    torch.testing.assert_close(tp.patch(model, num_tokens=found)(images).logits, plain, rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was(images):
    model = build(hidden_dropout_prob=0.5).train()
    model.vit.layers[1].eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    modes = [m.training for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    for options in ({}, {"target": "latency"}, {"budget": 1e-6}):
        try:
            search_schedule(model, [images], **{"budget": 0.8, "counts": COUNTS, **options})
        except ValueError:
            assert options != {}
    assert torch.equal(torch.rand(3), expected), "the random state"
    assert [m.training for m in model.modules()] == modes and [type(m) for m in model.modules()] == classes
    assert not calls and not patched_blocks(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_inputs_of_every_kind(images):
    model = build()
    found = search_schedule(model, [images], budget=0.7, counts=COUNTS)
    assert found == search_schedule(model, ((images,),), budget=0.7, counts=COUNTS)
    assert found == search_schedule(model, iter([{"pixel_values": images}]), budget=0.7, counts=COUNTS)
    assert found == search_schedule(model, [images], budget=0.7, counts=COUNTS, feature=lambda output: output["logits"])
    search_schedule(model.vit, [images], budget=0.7, counts=COUNTS)  # pooler_output


@pytest.mark.parametrize(
    "find", [{"budget": 0.7, "counts": COUNTS}, {"penalty": 1e-2, "steps": 2}], ids=["search", "learn"]
)
def test_what_loaders_give(images, find):
    """Lists, which torch's collation makes of tuples, and mappings of transformers."""
    search, model = search_schedule if "budget" in find else learn_schedule, build()
    found = search(model, [images], **find)
    data = torch.utils.data.TensorDataset(images)
    assert found == search(model, torch.utils.data.DataLoader(data, batch_size=3), **find)
    assert found == search(model, [transformers.BatchEncoding({"pixel_values": images})], **find)
    labelled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(3)), batch_size=3)
    assert found == search(model, [x for x, y in labelled], **find)
    data = [{"pixel_values": image, "labels": i} for i, image in enumerate(images)]
    assert found == search(model, torch.utils.data.DataLoader(data, batch_size=3), **find)
    layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
    with pytest.raises(TypeError, match="a batch must hold what Sequential takes and no more.*too many positional"):
        search(model, [[torch.zeros(2, 9, 8), torch.arange(2)]], **find)


@pytest.mark.parametrize(
    "find", [{"budget": 0.7, "counts": COUNTS}, {"penalty": 1e-2, "steps": 2}], ids=["search", "learn"]
)
@pytest.mark.parametrize(
    "bad, error, message",
    [
        (None, TypeError, "must be a tensor.*got NoneType"),
        ([], TypeError, "must be a tensor.*got list, empty"),
        ({}, TypeError, "must be a tensor.*got dict, empty"),
        ([None], TypeError, "must be a tensor.*got list"),
        ("abc", TypeError, "must be a tensor.*got str"),
        (3, TypeError, "must be a tensor.*got int"),
        ([3], ValueError, "must be what ViTForImageClassification runs on, got AttributeError"),
        (torch.zeros(0, 3, 56, 56), ValueError, "must be what ViTForImageClassification runs on"),
        (torch.full((1, 3, 56, 56), torch.nan), ValueError, r"must give a finite feature.* from 9408 NaN in the batch"),
        (torch.full((1, 3, 56, 56), torch.inf), ValueError, r"must give a finite feature"),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value)[:20],
)
def test_a_bad_batch_is_named(images, find, bad, error, message):
    search = search_schedule if "budget" in find else learn_schedule
    for at, batches in enumerate(([bad, images], [images, bad])):
        model = build()
        with pytest.raises(error, match=rf"^{search.__name__}: batches\[{at}\] {message}"):
            search(model, batches, **find)
        assert not patched_blocks(model)


@pytest.mark.parametrize(
    "find", [{"budget": 0.9, "counts": COUNTS}, {"penalty": 1e-2, "steps": 2}], ids=["search", "learn"]
)
def test_a_batch_is_what_the_model_takes(images, find):
    """NaN that the model puts numbers for, and objects of a class of its own."""

    class Filling(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build()

        def forward(self, box):
            return self.model(box.images.nan_to_num())

    class Table(Filling):
        def forward(self, images):
            return self.model(images.nan_to_num())

    search = search_schedule if "budget" in find else learn_schedule
    found = []
    for missing in (torch.nan, 0):
        images[0, :, :9] = missing
        found += [search(Filling(), [SimpleNamespace(images=images)], **find), search(Table(), [images], **find)]
    assert all(schedule == found[0] for schedule in found)


def test_a_loss_that_is_no_number_is_named(images):
    model = build()
    with pytest.raises(ValueError, match=r"^learn_schedule: batches\[1\] must give a finite loss, got nan"):
        batches = [images, images * torch.nan]
        learn_schedule(model, batches, penalty=1e-2, steps=2, loss=lambda out, batch: out.logits.square().mean())
    assert not patched_blocks(model)


@pytest.mark.parametrize(
    "error, message, changed",
    [
        (ValueError, r"budget must be in \(0, 1\], got 0", {"budget": 0}),
        (ValueError, r"budget must be in \(0, 1\], got 1.5", {"budget": 1.5}),
        (TypeError, "budget must be a float, got str", {"budget": "half"}),
        (ValueError, r"budget must be at least about 0\.\d+ .*got 0.01", {"budget": 0.01}),
        (ValueError, "target must be .*macs.*latency.*got 'time'", {"target": "time"}),
        (ValueError, "batches must hold at least one", {"batches": []}),
        (TypeError, "batches must be an iterable of inputs, got one Tensor", {"batches": torch.zeros(1, 3, 56, 56)}),
        (TypeError, "no list of transformer blocks in Linear", {"model": nn.Linear(2, 2)}),
        (ValueError, "block index must be from 0 to 3", {"layers": [4]}),
        (ValueError, "counts must be from 1 .*got 0", {"counts": [0]}),
        (TypeError, "search_schedule: counts must be an iterable of ints, got int", {"counts": 8}),
        (TypeError, "search_schedule: layers must be an iterable of ints, got int", {"layers": 1}),
        (TypeError, "batches must be an iterable of inputs, got one NoneType", {"batches": None}),
        (TypeError, "feature must give a floating tensor, got int", {"feature": lambda output: 3}),
        (TypeError, r"feature must give .*2 dimensions or more, got \(3,\)", {"feature": lambda out: out.logits[:, 0]}),
        (ValueError, "search_schedule: layers must name at least one block", {"layers": []}),
        (ValueError, "counts must be from 8 .*got 4", {"init": "bipartite"}),
        (TypeError, "unexpected keyword argument 'colour'", {"colour": 1}),
    ],
)
def test_errors(images, error, message, changed):
    arguments = {"model": build(), "batches": [images], "budget": 0.7, "counts": COUNTS, **changed}
    model, batches = arguments.pop("model"), arguments.pop("batches")
    with pytest.raises(error, match=message):
        search_schedule(model, batches, **arguments)
    assert not patched_blocks(model)


def test_patched_models_are_refused(images):
    model = tp.patch(build(), keep_ratio=0.5)
    with pytest.raises(ValueError, match="unpatch"):
        search_schedule(model, [images], budget=0.7, counts=COUNTS)
    assert patched_blocks(model), "and stay patched"


def test_different_lengths_are_refused():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    model = transformers.BertModel(config).eval()
    long, short = torch.arange(24).view(2, 12), torch.arange(16).view(2, 8)
    with pytest.raises(ValueError, match=r"one number of tokens, got \[\d+, \d+\]"):
        search_schedule(model, [long, short], budget=0.7, counts=COUNTS)
    assert search_schedule(model, [long, long], budget=0.7, counts=COUNTS)


def test_steps():
    """Of counts with the same time the largest, so never one just above a step."""
    assert steps_of([32, 28, 24, 20, 16, 12], [8.0, 7.9, 5.0, 5.05, 4.95, 2.0]) == ([32, 24, 12], [8.0, 5.0, 2.0])
    assert thinned(list(range(100, 0, -1)), [float(t) for t in range(100, 0, -1)], 4) == [100, 67, 34, 1]


def test_latency(images, monkeypatch):
    """On a made-up device whose blocks take a step every 8 tokens."""

    def seconds(search, schedules):
        rows = []
        for counts in schedules:
            left, row = 16, []
            for i in range(4):
                row.append(1.0 + -(-left // 8))
                if counts.get(i, 16) < left:
                    left, row[-1] = counts[i], row[-1] + 0.1
            rows.append([*row, 0.5])
        return rows

    monkeypatch.setattr(_Search, "seconds", seconds)
    model = build()
    found = search_schedule(model, [images], budget=0.85, target="latency")
    assert list(found.values()) == [8], "the one count below a step"
    with pytest.raises(ValueError, match="at least about 0.768"):  # (0.5 + 3 + 3 * 2 + 0.1) / 12.5
        search_schedule(model, [images], budget=0.7, target="latency")


def test_measured_latency(images, monkeypatch):
    """A clock that only a block's own tokens move."""
    clock = [0.0]
    monkeypatch.setattr("tokenpool_ext.vit.search.time.perf_counter", lambda: clock[0])
    model = build()
    for layer in model.vit.layers:
        forward = layer.mlp.forward

        def slow(x, *args, forward=forward):
            clock[0] += x.shape[1]
            return forward(x, *args)

        layer.mlp.forward = slow
    found = search_schedule(model, [images], budget=0.7, target="latency", counts=[8, 4])
    left, spent = 16, 0
    for i in range(4):
        spent += 1 + left  # a class token, and pooled after the block
        left = found.get(i, left)
    assert 0.5 < spent / (4 * 17) <= 0.7
    assert search_schedule(model, [images], budget=1.0, target="latency", counts=[8, 4]) == {3: 16}


def test_options_are_as_patch_has_them(images):
    model = build()
    for blocks in (None, "vit.layers", list(model.vit.layers), model.vit.layers[1:3]):
        tp.patch(model, keep_ratio=0.5, blocks=blocks)
        assert {module.num_prefix_tokens for module in patched_blocks(model).values()} == {1}, "the class token"
        tp.unpatch(model)
    found = search_schedule(model, [images], budget=0.8, counts=COUNTS)
    assert found == search_schedule(model, [images], budget=0.8, counts=COUNTS, blocks=iter(model.vit.layers))
    assert min(search_schedule(model, [images], budget=0.9, init="bipartite").values()) >= 8


def test_no_other_generator_is_seeded(images, monkeypatch):
    def fail(seed):
        raise AssertionError("seeds generators that are not restored")

    model = build()
    monkeypatch.setattr(torch, "manual_seed", fail)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    before = torch.get_rng_state()
    search_schedule(model, [images], budget=0.8, counts=COUNTS)
    assert torch.equal(torch.get_rng_state(), before)


# --- learn_schedule: PoWER-BERT's soft extraction


def test_soft_extract_by_hand():
    x, sizes = torch.rand(1, 4, 2), torch.tensor([[1.0, 1.0, 2.0, 4.0]])
    layer = SoftExtract(keep_ratio=1.0, num_prefix_tokens=1)
    scores = torch.tensor([[9.0, 0.1, 0.7, 0.2]])
    assert torch.equal(layer(x, scores, sizes=sizes)[2], sizes)
    layer.retention = torch.tensor([1.0, 0.5, 0.25])
    tokens, clusters, new = layer(x, scores, sizes=sizes)
    assert new.tolist() == [[1.0, 0.25, 2.0, 2.0]], "prefix, third, first and second by score"
    assert tokens is x and clusters.assignment.tolist() == [[0, 1, 2]]
    mask = torch.tensor([[True, True, False, True]])
    assert layer(x, scores, mask=mask, sizes=sizes)[2].tolist() == [[1.0, 0.5, 0.5, 4.0]], "padding has the last rank"


def test_more_penalty_keeps_fewer(images):
    model = build()
    sums = []
    for penalty in (1e-4, 1e-3, 1.0):
        found = learn_schedule(model, [images], penalty=penalty, steps=15, lr=0.1)
        counts = list(found.values())
        assert counts == sorted(counts, reverse=True) and list(found) == sorted(found) and counts[-1] >= 1
        sums.append(sum(min([16, *(n for j, n in found.items() if j <= i)]) for i in range(4)))
        assert torch.isfinite(tp.patch(model, num_tokens=found)(images).logits).all()
        tp.unpatch(model)
    assert sums[0] > sums[1] > sums[2] == 4, "one token a block"
    assert learn_schedule(model, [images], penalty=0.0, steps=1, lr=0.0) == {2: 16}, "nothing drawn down"


def test_drawn_down_where_it_is_harmless(images):
    """Behind block 1 attention adds nothing: the loss holds block 0 alone."""
    model = build()
    with torch.no_grad():
        for layer in (2, 3):
            for parameter in model.vit.layers[layer].attention.o_proj.parameters():
                parameter.zero_()
    found = learn_schedule(model, [images], penalty=1e-4, steps=30, lr=0.05, layers=[0, 1], loss=held)
    assert found[1] == 1 and found.get(0, 16) > 8


def held(output, batch):
    """That of block 0 is worth far more than its penalty."""
    plain = build()
    with torch.no_grad():
        for layer in (2, 3):
            for parameter in plain.vit.layers[layer].attention.o_proj.parameters():
                parameter.zero_()
        target = plain(batch).logits
    return 100 * (output.logits - target).square().mean()


def test_what_was_drawn_to_nothing_comes_back(images):
    """Nothing holds the tokens for 15 steps; then the loss does, by far more than the penalty."""
    model, seen = build(), []
    target = build()(images).logits.detach()

    def late(output, batch):
        seen.append((output.logits - target).square().mean())
        return 1e4 * seen[-1] if len(seen) > 15 else 0 * seen[-1]

    found = learn_schedule(model, [images], penalty=1e-3, steps=60, lr=0.1, loss=late)
    assert seen[14] > 10 * seen[-1], "what was left out came back"
    assert found.get(2, 16) > 8, found


def test_learning_leaves_the_model_as_it_was(images):
    model = build(hidden_dropout_prob=0.5).train()
    modes, classes = [m.training for m in model.modules()], [type(m) for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    found = learn_schedule(model, [images, images], penalty=1e-2, steps=3)
    assert torch.equal(torch.rand(3), expected), "the random state"
    assert found == learn_schedule(model, [{"pixel_values": images}], penalty=1e-2, steps=3), "deterministic"
    with pytest.raises(RuntimeError, match="stop"):
        learn_schedule(model, [images], penalty=1e-2, steps=3, loss=fail)
    assert [m.training for m in model.modules()] == modes and [type(m) for m in model.modules()] == classes
    assert not patched_blocks(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_learning_needs_gradients(images):
    with torch.no_grad():
        assert learn_schedule(build(), [images], penalty=1e-3, steps=1)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="learn_schedule.*outside torch.inference_mode"):
        learn_schedule(build(), [images], penalty=1e-3, steps=1)


def fail(output, batch):
    raise RuntimeError("stop")


@pytest.mark.parametrize(
    "error, message, changed",
    [
        (ValueError, "penalty must be finite and at least 0, got -1", {"penalty": -1}),
        (ValueError, "steps must be", {"steps": 0}),
        (ValueError, "batches must hold at least one", {"batches": []}),
        (TypeError, "no list of transformer blocks in Linear", {"model": nn.Linear(2, 2)}),
        (TypeError, "unexpected keyword argument 'weighted'", {"weighted": True}),
        (ValueError, "unpatch", {"model": "patched"}),
    ],
)
def test_errors_of_learning(images, error, message, changed):
    arguments = {"model": build(), "batches": [images], "penalty": 1e-3, "steps": 1, **changed}
    model, batches = arguments.pop("model"), arguments.pop("batches")
    model = tp.patch(build()) if model == "patched" else model
    with pytest.raises(error, match=message):
        learn_schedule(model, batches, **arguments)
