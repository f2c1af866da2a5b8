"""`python -m tokenpool_ext doctor` reports, and finds a backend that computes something else."""

from tokenpool_ext import __main__, backends, doctor, functional


def test_the_report(capsys):
    assert __main__.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("tokenpool_ext", "plan for", "self-test", "reference  ok", *backends()):
        assert word in said


def test_a_wrong_backend_is_found(monkeypatch, capsys):
    honest = functional.kmeans

    def kmeans(x, k, *, backend, **given):
        clusters = honest(x, k, backend="reference", **given)
        return clusters if backend == "reference" else clusters._replace(assignment=clusters.assignment.flip(1))

    monkeypatch.setattr(doctor.functional, "kmeans", kmeans)
    monkeypatch.setitem(doctor.REGISTRY, "wrong", doctor.REGISTRY["reference"])
    assert doctor.main() == 1
    assert "WRONG" in capsys.readouterr().out
