"""The drop-ins against the installed libraries: sentence-transformers 6, colpali-engine, PyLate. Skipped where one is
not installed."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tokenpool_ext.retrieval import TokenPooler

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] [Q] [D] page of a book about light and glass ships sail north . ,".split()
TEXTS = ["a page of a book about light and glass", "ships sail north", "glass", "a book , a page . a page of light"]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).eval().save_pretrained(path)
    tokenizer = transformers.BertTokenizer(str(path / "vocab.txt"))
    tokenizer.save_pretrained(path)
    return str(path)


def unit(*lengths, features=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [normalize(torch.randn(n, features, generator=generator), dim=-1).to(dtype) for n in lengths]


# ---- sentence-transformers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def st():
    modules = pytest.importorskip(
        "sentence_transformers.multi_vector_encoder.modules", reason="sentence-transformers 6"
    )
    from tokenpool_ext.retrieval.sentence_transformers import KMeansTokenPooling

    return modules, KMeansTokenPooling


@pytest.fixture(scope="module")
def encoder(st, tiny_bert):
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Transformer

    modules, KMeansTokenPooling = st

    def build(*last):
        transformer = Transformer(tiny_bert, transformer_task="feature-extraction")
        return MultiVectorEncoder(modules=[transformer, modules.MultiVectorMask(), *last])

    return build


@pytest.mark.parametrize("factor", [1, 1.5, 2, 3, 7])
@pytest.mark.parametrize("options", [{}, {"num_protected_tokens": 0}, {"normalize_embeddings": False}], ids=str)
def test_sentence_transformers_counts_dtypes_and_padding_are_those_of_its_own_pooling(st, factor, options):
    pytest.importorskip("scipy")
    modules, KMeansTokenPooling = st
    own, theirs = KMeansTokenPooling(factor, **options), modules.HierarchicalTokenPooling(factor, **options)
    for dtype in (torch.float32, torch.bfloat16):
        docs = unit(1, 2, 9, 40, 41, dtype=dtype)
        pooled = own.pool(docs)
        for a, b in zip(pooled, theirs.pool(docs)):
            assert a.shape == b.shape and a.dtype == b.dtype
        padded = torch.nn.utils.rnn.pad_sequence(docs, batch_first=True)
        mask = torch.arange(41) < torch.tensor([len(x) for x in docs])[:, None]
        for side, keywords in (("right", {"attention_mask": mask}), ("left", {"attention_mask": mask}), ("right", {})):
            a = own.pool(padded, padding_side=side, **keywords)
            assert a.shape == theirs.pool(padded, padding_side=side, **keywords).shape
            for row, x in zip(a, pooled):
                rows = row[len(row) - len(x) :] if side == "left" else row[: len(x)]
                assert torch.equal(rows, x)
        features = {"token_embeddings": padded, "attention_mask": mask.long()}
        out = own(dict(features))
        for x, m, y in zip(out["token_embeddings"], out["attention_mask"].bool(), pooled):
            assert torch.equal(x[m], y)
        assert own(dict(features), task="query")["token_embeddings"] is padded
    assert own.pool([]) == [] and own.pool(padded, task="query") is padded


def test_sentence_transformers_gradients_flow(st):
    x = unit(30)[0].requires_grad_()
    features = {"token_embeddings": x[None], "attention_mask": torch.ones(1, 30)}
    st[1](3)(features)["token_embeddings"].square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_sentence_transformers_checkpoint(st, encoder, tmp_path):
    from sentence_transformers import MultiVectorEncoder

    pooling = st[1](1.5, num_protected_tokens=1, max_tokens=9, tasks=["query", "document"])
    model = encoder(pooling)
    expected = model.encode_document(TEXTS)
    plain = encoder().encode_document(TEXTS)
    assert [len(x) for x in expected] == [
        TokenPooler(1.5, protected_tokens=1, max_tokens=9).most_vectors(len(x)) for x in plain
    ]
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = MultiVectorEncoder(str(tmp_path / "saved"), trust_remote_code=True)
    last = list(loaded)[-1]
    assert type(last) is st[1] and last.get_config_dict() == pooling.get_config_dict()
    for a, b in zip(loaded.encode_document(TEXTS), expected):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))


def test_sentence_transformers_attributes_set_later_are_those_given_at_first(st):
    docs = unit(40, 9, 1)
    later = {"pool_factor": 5.0, "num_protected_tokens": 3, "normalize_embeddings": False, "max_tokens": 6}
    for name, value in later.items():
        pooling, theirs = st[1](2.0), st[0].HierarchicalTokenPooling(2.0)
        for module in (pooling, theirs):
            setattr(module, name, value)
        expected = st[1](**{"pool_factor": 2.0, name: value})
        assert all(torch.equal(a, b) for a, b in zip(pooling.pool(docs), expected.pool(docs)))
        if name != "max_tokens":
            assert [len(x) for x in pooling.pool(docs)] == [len(x) for x in theirs.pool(docs)]
    pooling.pool_factor = 0.5
    with pytest.raises(ValueError, match="pool_factor"):
        pooling.pool(docs)
    pooling.pool_factor, pooling.max_tokens = np.float32(1.5), np.int64(6)
    assert json.loads(json.dumps(pooling.get_config_dict()))["pool_factor"] == 1.5


def test_sentence_transformers_pooling_of_one_call(st, encoder):
    model = encoder()
    plain = [torch.as_tensor(x) for x in model.encode_document(TEXTS)]
    pooled = model.encode_document(TEXTS, token_pooling=st[1](2))
    for a, b in zip(pooled, TokenPooler(2, protected_tokens=1)(plain)):
        torch.testing.assert_close(torch.as_tensor(a), b)
    assert [len(x) for x in model.encode_query(TEXTS, token_pooling=st[1](2))] == [
        len(x) for x in model.encode_query(TEXTS)
    ]


# ---- colpali-engine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_colpali_engine(factor):
    token_pooling = pytest.importorskip("colpali_engine.compression.token_pooling", exc_type=ImportError)
    from tokenpool_ext.retrieval.colpali import KMeansTokenPooler

    own, theirs = KMeansTokenPooler(), token_pooling.HierarchicalTokenPooler()
    docs = unit(2, 9, 40, 41)
    a = own.pool_embeddings(docs, return_dict=True, pool_factor=factor, num_workers=2)
    b = theirs.pool_embeddings(docs, return_dict=True, pool_factor=factor)
    assert [x.shape for x in a.pooled_embeddings] == [x.shape for x in b.pooled_embeddings]
    for x, y, clusters in zip(docs, a.pooled_embeddings, a.cluster_id_to_indices):
        assert sorted(torch.cat([c[0] for c in clusters.values()]).tolist()) == list(range(len(x)))
        means = torch.stack([x[clusters[j]].mean(0) for j in range(len(y))])
        torch.testing.assert_close(y, normalize(means, dim=-1))
    for side in ("left", "right"):
        padded = torch.nn.utils.rnn.pad_sequence(docs, batch_first=True, padding_side=side)
        out = own.pool_embeddings(padded, padding=True, padding_side=side, pool_factor=factor)
        expected = torch.nn.utils.rnn.pad_sequence(a.pooled_embeddings, batch_first=True, padding_side=side)
        assert torch.equal(out, expected)
    assert [len(x) for x in own.pool_embeddings(unit(1, 0, 6), pool_factor=factor)] == [1, 0, max(6 // factor, 1)]


# ---- PyLate ----------------------------------------------------------------------------------------------------------


def test_pylate(tiny_bert):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pytest.importorskip("pylate.models", exc_type=ImportError)
    from tokenpool_ext.retrieval.pylate import use_kmeans

    with pytest.raises(TypeError, match="pylate.models.ColBERT"):
        use_kmeans(torch.nn.Linear(1, 1))
    model = models.ColBERT(tiny_bert, embedding_size=16, device="cpu")
    plain = model.encode(TEXTS, is_query=False)
    theirs = model.encode(TEXTS, is_query=False, pool_factor=2)
    assert use_kmeans(model) is model
    own = model.encode(TEXTS, is_query=False, pool_factor=2)
    assert [x.shape for x in own] == [x.shape for x in theirs]
    expected = TokenPooler(2, protected_tokens=1)([torch.as_tensor(x) for x in plain])
    for a, b in zip(own, expected):
        torch.testing.assert_close(torch.as_tensor(a), b)
    for a, b in zip(model.encode(TEXTS, is_query=True), model.encode(TEXTS, is_query=True, pool_factor=2)):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))
