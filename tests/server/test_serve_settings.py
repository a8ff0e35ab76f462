"""Settings from flags, environment, file and defaults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sera_serve.cli import build_cli
from sera_serve.config import ServeSettings, load_settings, load_with_sources
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


@pytest.mark.parametrize("name", ["watch", "lora_path_root"])
def test_an_empty_path_turns_nothing_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`${WATCH:-}` is an empty variable, and Path("") would be the current directory."""
    file = tmp_path / "serve.yaml"
    file.write_text(f"{name}: {tmp_path}\n")
    assert getattr(load_settings(file, {}), name) == tmp_path
    assert getattr(load_settings(file, {name: ""}), name) is None
    monkeypatch.setenv(f"SERA_SERVE_{name.upper()}", "")
    assert getattr(load_settings(None, {}), name) is None
    assert getattr(load_settings(file, {}), name) is None
    shown = CliRunner().invoke(build_cli(), ["check-config", "--config", str(file), f"--{name.replace('_', '-')}", ""])
    assert f"{name} null flag" in " ".join(shown.stdout.split()), shown.output


@pytest.mark.parametrize("watched", ["store", "store/adapters", ".", "link", "store/../store"])
def test_neither_the_store_nor_the_watched_directory_lies_in_the_other(watched: str, tmp_path: Path) -> None:
    """The store's bundles would be published as adapters of a tenant `bundles`."""
    (tmp_path / "link").symlink_to("store")
    store = tmp_path / "store"
    for flags in ({"store": store}, {"store": tmp_path / "link"}):
        with pytest.raises(InvalidConfiguration, match="neither may lie in the other") as caught:
            load_settings(None, flags | {"watch": tmp_path / watched})
        assert caught.value.param == "watch"
    assert load_settings(None, {"store": store, "watch": tmp_path / "store2"}).watch == tmp_path / "store2"


def test_auth_is_off_where_yaml_reads_false(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("auth: off\n")
    assert load_settings(file, {}).auth == "off"
    file.write_text("auth: on\n")
    with pytest.raises(InvalidConfiguration, match="it should be 'auto', 'keys' or 'off'"):
        load_settings(file, {})


def test_an_empty_store_is_refused_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("store: ''\n")
    with pytest.raises(
        InvalidConfiguration, match=r"store \(file .*serve.yaml; flag --store\) is '': it must be the path of a folder"
    ):
        load_settings(file, {})
    with pytest.raises(InvalidConfiguration, match=r"store \(flag --store\) is '': "):
        load_settings(file, {"store": ""})
    monkeypatch.setenv("SERA_SERVE_STORE", "")
    with pytest.raises(InvalidConfiguration, match=r"store \(variable SERA_SERVE_STORE; flag --store\) is '': "):
        load_settings(None, {})


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
        # Values that YAML reads and Python cannot make, each with an error of its own type.
        ("host: 2024-13-45", "config", "cannot be read"),
        ("host: !!timestamp x", "config", "cannot be read"),
        ("host: !!bool x", "config", "cannot be read"),
        ("port: !!int ''", "config", "cannot be read"),
        ("quotas: {2024-13-45: {bytes: 1}}", "config", "cannot be read"),
        ("host: " + "[" * 2000, "config", "nested too deeply"),
        ("port: 1\nhost: localhost\nport: 2", "config", "'port' is there twice"),
        ("quotas: {acme: {bytes: 1}, acme: {adapters: 5}}", "config", "'acme' is there twice"),
        ("tenant_weights: acme=1,acme=2", "tenant_weights", "two weights"),
        ("device: foo", "device", "cuda:1"),
        ("device: meta", "device", "write cpu"),
        ("device: cuda:x", "device", "write cpu"),
        ("cpu_threads: 5000000000", "cpu_threads", "1024"),
        ("training_threads: 5000000000", "training_threads", "1024"),
        ("pool_mib: 10000000000000000000000", "pool_mib", "--pool-mib"),
        ("max_resident: 1000000000000", "max_resident", "--max-resident"),
        ("kv_cache_tokens: 1000000000000000", "kv_cache_tokens", "--kv-cache-tokens"),
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


@pytest.mark.parametrize("text", ["{2024-13-45: {bytes: 1}}", "{acme: {bytes: !!bool x}}", "[" * 2000])
def test_quotas_of_a_variable_that_are_no_yaml_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SERA_SERVE_QUOTAS", text)
    with pytest.raises(InvalidConfiguration, match="not YAML") as caught:
        load_settings(None, {})
    assert caught.value.param == "quotas"


def test_keys_that_are_merged_may_be_given_anew(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("quotas:\n  acme: &small {adapters: 5, bytes: 10}\n  other: {<<: *small, bytes: 20}\n")
    assert load_settings(file, {}).quotas == {
        "acme": {"adapters": 5, "bytes": 10},
        "other": {"adapters": 5, "bytes": 20},
    }


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SERA_SERVE_SERVICE_HOST", "10.0.0.1"),
        ("SERA_SERVE_SERVICE_PORT", "8000"),
        ("SERA_SERVE_SERVICE_PORT_HTTP", "8000"),
        ("SERA_SERVE_PORT", "tcp://10.0.0.1:8000"),
        ("SERA_SERVE_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("SERA_SERVE_EAST_SERVICE_HOST", "10.0.0.1"),
    ],
)
def test_variables_of_a_service_of_kubernetes_are_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidConfiguration, match="enableServiceLinks: false") as caught:
        load_settings(None, {})
    assert caught.value.param == variable


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:15"])
def test_devices_of_the_base(device: str) -> None:
    assert ServeSettings(device=device).device == device


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="No such file"):
        load_settings(tmp_path / "absent.yaml", {})


def test_the_file_may_be_a_pipe_that_is_read_once() -> None:
    def piped(text: str) -> Path:
        reading, writing = os.pipe()
        os.write(writing, text.encode())
        os.close(writing)
        return Path(f"/dev/fd/{reading}")

    settings, sources = load_with_sources(piped("port: 1234"), {"host": "localhost"})
    assert settings.port == 1234
    assert (sources["port"].startswith("file "), sources["host"], sources["store"]) == (True, "flag --host", "default")
    with pytest.raises(InvalidConfiguration, match=r"port \(file /dev/fd/"):
        load_settings(piped("port: 123456"), {})


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


@pytest.mark.parametrize("variable", ["SERA_SERVE_PORT", "sera_serve_port"])
def test_a_variable_of_another_program_does_not_hide_the_server_s_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.setenv(variable, "9")
    # Later in the environment, with the setting's name and no prefix.
    monkeypatch.setenv("PORT", "80")
    file = tmp_path / "serve.yaml"
    file.write_text("port: 7")
    settings, sources = load_with_sources(file, {})
    assert (settings.port, sources["port"]) == (9, f"variable {variable}")
