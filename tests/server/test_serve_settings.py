"""Settings from flags, environment, file and defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from sera_serve.config import ServeSettings, load_settings
from sera_serve.errors import InvalidConfiguration


def test_the_first_source_with_a_value_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\npool_mib: 1\nhost: a\n")
    monkeypatch.setenv("SERA_SERVE_PORT", "2")
    monkeypatch.setenv("SERA_SERVE_POOL_MIB", "2")
    settings = load_settings(file, {"port": 3, "host": None})
    assert (settings.port, settings.pool_mib, settings.host) == (3, 2, "a")
    assert settings.max_queue == ServeSettings.model_fields["max_queue"].default
    assert load_settings(None, {}).port == 2


@pytest.mark.parametrize(
    ("content", "param", "words"),
    [
        ("prot: 1", "prot", "did you mean 'port'"),
        ("port: [", "config", "cannot be read"),
        ("- port", "config", "setting: value"),
        ("port: 70000", "port", "--port"),
        ("pool_mib: lots", "pool_mib", "--pool-mib"),
        ("dtype: int3", "dtype", "float32"),
        ("tenant_weights: 3", "tenant_weights", "--tenant-weights"),
        ("tenant_weights: {acme: 0}", "tenant_weights", "positive"),
        ("tenant_weights: {acme: .inf}", "tenant_weights", "finite"),
        ("tenant_weights: {acme/writer: 2}", "tenant_weights", "is no tenant"),
        ("tenant_weights: acme", "tenant_weights", "tenant=weight"),
        ("tenant_weights: acme=much", "tenant_weights", "number"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, param: str, words: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    with pytest.raises(InvalidConfiguration, match=words) as caught:
        load_settings(file, {})
    assert caught.value.param == param


def test_weights_are_a_mapping_in_a_file_and_pairs_in_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("tenant_weights: {acme: 2, _base: 0.5}\n")
    weights = {"acme": 2.0, "_base": 0.5}
    assert load_settings(file, {}).tenant_weights == weights
    assert load_settings(None, {"tenant_weights": "acme=2, _base=0.5"}).tenant_weights == weights
    monkeypatch.setenv("SERA_SERVE_TENANT_WEIGHTS", "acme=2,_base=0.5")
    assert load_settings(None, {}).tenant_weights == weights


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="No such file"):
        load_settings(tmp_path / "absent.yaml", {})


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("# nothing yet\n")
    assert (
        load_settings(tmp_path / "serve.yaml", {"port": 5}).model_dump()
        == load_settings(None, {"port": 5}).model_dump()
    )


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERA_SERVE_POOL_MB", "2")
    with pytest.raises(InvalidConfiguration, match="did you mean 'pool_mib'"):
        load_settings(None, {})
