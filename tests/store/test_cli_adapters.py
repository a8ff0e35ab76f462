"""The command line `sera-serve adapters`."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_factory import MODULE, Q, bundle_path, classifier_fields, fill, make_bundle, make_classifier
from click.testing import Result
from peft import PeftModel
from raw_files import tar_bytes, two_files
from safetensors import SafetensorError
from transformers import LlamaForCausalLM
from transformers.utils.logging import enable_progress_bar
from typer.testing import CliRunner

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, combine
from sera_serve import SeraConfig
from sera_serve.access import AccessDatabase, AccessDatabaseError, Shares
from sera_serve.base import load_base
from sera_serve.commands import imports
from sera_serve.commands.adapters import adapters_app
from support.factories import random_adapter, random_decoder
from support.peft_checkpoints import save_checkpoint

NAME = "acme/support"
Run = Callable[..., Result]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def run(store: AdapterStore) -> Run:
    # As in a process of its own: the progress of transformers is a setting of the process.
    enable_progress_bar()

    def invoke(*arguments: object, at: Path | None = None) -> Result:
        return CliRunner().invoke(adapters_app, [*map(str, arguments), "--store", str(at or store.root)])

    return invoke


def fields(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_the_list_names_damaged_adapters_on_stderr(
    run: Run, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(make_bundle(1), "acme/whole")
    store.publish(make_bundle(2), NAME)
    path = store.root / "adapters" / NAME / "versions" / "v1.json"
    path.write_bytes(b"")
    # As in a process of its own: no handler takes what a command warns of.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    result = run("list", "--json")
    assert [info["adapter"] for info in fields(result)["adapters"]] == ["acme/whole"]
    assert result.stderr.startswith(f"adapter {NAME} is left out of lists: {path} is damaged; ")
    assert result.stderr.count("\n") == 1


def test_import_list_inspect(run: Run, store: AdapterStore, tmp_path: Path) -> None:
    bundle = make_classifier(training={"epochs": 3})
    bundle.save(tmp_path / "bundle")
    assert fields(run("import", tmp_path / "bundle", "--name", NAME, "--json")) == {
        "adapter": NAME,
        "version": 1,
        "digest": bundle.digest,
        "warnings": [],
    }
    assert run("import", tmp_path / "bundle", "--name", NAME).stdout == f"published {NAME} v1\n"
    listed = fields(run("list", "--json"))["adapters"]
    assert [(info["adapter"], info["version"], info["aliases"]) for info in listed] == [(NAME, 1, {"latest": 1})]
    assert fields(run("list", "--tenant", "other", "--json")) == {"adapters": []}
    shown = fields(run("inspect", f"{NAME}@v1", "--json"))
    assert shown["digest"] == bundle.digest
    assert shown["config"] == bundle.config.model_dump()
    for text in (NAME, "v1", "classify", "latest=v1", str(bundle.config.parameters)):
        assert text in run("list").stdout
    for text in (bundle.digest, Q, "epochs", "no", "yes", "last_token"):
        assert text in run("inspect", NAME).stdout
    assert "holds no adapters of tenant other;" in run("list", "--tenant", "other").stdout


@pytest.mark.parametrize("form", ["file", "tar"])
def test_import_of_single_files(run: Run, store: AdapterStore, tmp_path: Path, form: str) -> None:
    bundle = make_bundle()
    config, model = two_files(bundle)
    tar = tar_bytes(("adapter_config.json", config), ("adapter_model.safetensors", model))
    (tmp_path / "upload").write_bytes(bundle.to_bytes() if form == "file" else tar)
    assert fields(run("import", tmp_path / "upload", "--name", NAME, "--json"))["digest"] == bundle.digest


def test_import_makes_the_store(run: Run, tmp_path: Path) -> None:
    make_bundle().save(tmp_path / "bundle")
    assert run("import", tmp_path / "bundle", "--name", NAME, at=tmp_path / "new").exit_code == 0
    assert AdapterStore(tmp_path / "new", create=False).resolve(NAME).version == 1


@pytest.mark.parametrize("output", ["out", "out.safetensors", "new/folder/out"])
def test_export_of_our_format(run: Run, store: AdapterStore, tmp_path: Path, output: str) -> None:
    bundle = make_classifier()
    store.publish(bundle, NAME)
    path = tmp_path / output
    assert fields(run("export", NAME, "--output", path, "--json")) == {
        "adapter": NAME,
        "version": 1,
        "digest": bundle.digest,
        "format": "sera",
        "output": str(path),
    }
    assert path.is_dir() == (path.suffix == "")
    assert AdapterBundle.load(path).digest == bundle.digest


@pytest.mark.parametrize("output", ["x", "adapters/acme/new", "bundles/y.safetensors", "../store/tmp/z"])
def test_an_export_into_the_store_is_refused(run: Run, store: AdapterStore, output: str) -> None:
    """The store would take the files for its own: it would list them, or remove them."""
    store.publish(make_bundle(), NAME)
    before = sorted(store.root.rglob("*"))
    assert_refused(run("export", NAME, "--output", store.root / output), "is inside the store")
    card = run("export", NAME, "--output", store.root.parent / "out", "--card", store.root / output)
    assert_refused(card, "is inside the store")
    assert sorted(store.root.rglob("*")) == before


def test_an_export_to_a_link_that_leads_nowhere_is_refused(run: Run, store: AdapterStore, tmp_path: Path) -> None:
    store.publish(make_bundle(), NAME)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert_refused(run("export", NAME, "--output", tmp_path / "link"), "link exists")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("form", ["sera", "peft"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, SafetensorError("I/O error: full (os error 28)")])
@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_an_export_that_is_stopped_leaves_nothing(
    run: Run,
    store: AdapterStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    fault: BaseException,
    output: str,
) -> None:
    store.publish(make_bundle(), NAME)

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise fault

    monkeypatch.setattr("safetensors.torch.save_file", half)
    result = run("export", NAME, "--output", tmp_path / output, "--format", form)
    if fault is KeyboardInterrupt:
        assert result.exit_code == 130
    else:
        assert_refused(result, "No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_an_export_to_a_place_that_takes_no_file_is_one_line(run: Run, store: AdapterStore) -> None:
    store.publish(make_bundle(), NAME)
    assert_refused(run("export", NAME, "--output", "/proc/x.safetensors"), "/proc/x.safetensors: ")


def test_export_as_peft_warns_about_the_head(run: Run, store: AdapterStore, tmp_path: Path) -> None:
    store.publish(make_classifier(), NAME)
    result = run("export", NAME, "--format", "peft", "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout == f"wrote {NAME} v1 as peft to {tmp_path / 'out'}\n"
    assert "classifier's head" in result.stderr
    assert str(tmp_path / "out" / "head.safetensors") in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
    ]


def test_export_as_peft_warns_about_layers_of_different_scaling(run: Run, store: AdapterStore, tmp_path: Path) -> None:
    for name, scaling in ("acme/even", 0.5), ("acme/uneven", 2.0):
        modules = {Q: MODULE, Q.replace("q_proj", "v_proj"): {**MODULE, "scaling": scaling}}
        store.publish(make_bundle(modules=modules), name)
        result = run("export", name, "--format", "peft", "--output", tmp_path / name)
        assert result.exit_code == 0
        assert ("vLLM scales all layers alike: give it --format merged" in result.stderr) == (name == "acme/uneven")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_merged_export_is_a_model_that_needs_no_adapter(run: Run, store: AdapterStore, tmp_path: Path) -> None:
    base = random_decoder()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    loaded = load_base(str(tmp_path / "base"))
    template = "{{ messages[0].content }}"
    config = SeraConfig(8, 4, 8.0, ["q_proj", "down_proj"])
    bundle = random_adapter(loaded, config, seed=1, chat_template=template, format_version=2)
    store.publish(bundle, NAME)
    merged, peft = tmp_path / "merged", tmp_path / "peft"
    result = run("export", NAME, "--format", "merged", "--base", tmp_path / "base", "--output", merged)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert run("export", NAME, "--format", "peft", "--output", peft).exit_code == 0
    # Another account, such as a vLLM's, may read each of them or none.
    assert len({path.stat().st_mode for folder in (merged, peft) for path in folder.iterdir()}) == 1
    tokens = torch.arange(30).view(1, 30)
    with torch.no_grad():
        plain = loaded.model(tokens).logits
        alone = LlamaForCausalLM.from_pretrained(merged)(tokens).logits
        adapted = PeftModel.from_pretrained(loaded.model, str(peft))(tokens).logits
    assert (alone - plain).abs().max() > 0.1
    assert torch.allclose(alone, adapted, rtol=0, atol=1e-3)
    tokenizer = load_base(str(merged)).tokenizer
    assert tokenizer.decode([72, 105]) == loaded.tokenizer.decode([72, 105])
    assert tokenizer.chat_template == template


def test_merging_into_another_base_is_refused(run: Run, store: AdapterStore, tmp_path: Path) -> None:
    base = random_decoder()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    store.publish(make_bundle(), NAME)
    output = tmp_path / "out"
    result = run("export", NAME, "--format", "merged", "--base", tmp_path / "base", "--output", output)
    assert_refused(result, "was made for base 'tiny'")
    assert not output.exists()


def test_a_deletion_whose_shares_could_not_end_is_recorded_and_can_be_repeated(
    run: Run, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(make_bundle(1), NAME)
    shares = Shares(AccessDatabase(store.root))
    shares.add(NAME, "bob")

    def busy(self: Shares, adapter: str) -> None:
        raise AccessDatabaseError("the database is locked")

    with monkeypatch.context() as patched:
        patched.setattr(Shares, "remove_all", busy)
        assert_refused(run("delete", NAME), "the database is locked")
    log = (store.root / "access" / "audit.jsonl").read_text()
    assert json.loads(log)["action"] == "adapter.delete"
    assert shares.of(NAME) == ["bob"]
    assert_refused(run("delete", NAME), "not in the store")
    assert shares.of(NAME) == []


def test_delete_and_alias(run: Run, store: AdapterStore) -> None:
    for seed in range(3):
        store.publish(make_bundle(seed), NAME)
    assert fields(run("alias", f"{NAME}@v1", "stable", "--json")) == {
        "adapter": NAME,
        "aliases": {"latest": 3, "stable": 1},
    }
    assert run("alias", f"{NAME}@v2", "stable").stdout == f"{NAME}: latest=v3, stable=v2\n"
    assert_refused(run("delete", f"{NAME}@v2"), "move that alias first")
    assert fields(run("alias", NAME, "stable", "--remove", "--json"))["aliases"] == {"latest": 3}
    assert fields(run("delete", f"{NAME}@v2", "--json"))["bundles_freed"] == 1
    assert store.inspect(NAME).versions == (1, 3)
    assert run("delete", NAME).stdout.startswith(f"deleted {NAME}; ")
    assert list(store.iter_adapters()) == []


@pytest.mark.parametrize("file", ["aliases/old.json", "aliases/latest.json", "versions/v2.json"])
def test_an_alias_is_pointed_and_removed_beside_damage(file: str, run: Run, store: AdapterStore) -> None:
    for seed in range(2):
        store.publish(make_bundle(seed), NAME)
    store.set_alias(NAME, "old", f"{NAME}@v1")
    path = store.root / "adapters" / NAME / file
    path.write_text("{")
    left = {"latest": 2, "old": 1}
    left.pop(path.stem, None)
    for words, aliases in (
        (["alias", f"{NAME}@v1", "stable"], {**left, "stable": 1}),
        (["alias", NAME, "stable", "--remove"], left),
    ):
        result = run(*words, "--json")
        assert result.exit_code == 0 and json.loads(result.stdout)["aliases"] == aliases
        assert (f"{path} is damaged" in result.stderr) == (path.parent.name == "aliases")


@pytest.mark.parametrize("last", ["@v2", "@latest", ""])
def test_shares_end_with_the_last_version(last: str, run: Run, store: AdapterStore) -> None:
    for seed in range(2):
        store.publish(make_bundle(seed), NAME)
    assert run("share", NAME, "--with", "rival").exit_code == 0
    shares = Shares(AccessDatabase(store.root))
    assert run("delete", f"{NAME}@v1").exit_code == 0
    assert shares.of(NAME) == ["rival"]
    assert run("delete", f"{NAME}{last}").exit_code == 0
    assert shares.of(NAME) == []


def test_a_share_of_a_damaged_adapter_can_be_ended(run: Run, store: AdapterStore) -> None:
    store.publish(make_bundle(), NAME)
    assert run("share", NAME, "--with", "rival").exit_code == 0
    (store.root / "adapters" / NAME / "versions" / "v1.json").write_text("{")
    assert_refused(run("share", NAME, "--with", "friend"), "v1.json is damaged")
    assert run("share", NAME, "--with", "rival", "--remove").exit_code == 0
    # What is no text is nobody's name.
    for nobody in ("rival", os.fsdecode(b"\xff")):
        assert_refused(run("share", NAME, "--with", nobody, "--remove"), "is not shared with")


def test_a_first_version_begins_without_shares(run: Run, store: AdapterStore, tmp_path: Path) -> None:
    shares = Shares(AccessDatabase(store.root))
    for seed in (1, 2):
        # As a command leaves it that is killed after the deletion; a further version keeps the shares.
        shares.add(NAME, f"rival-{seed}")
        make_bundle(seed).save(tmp_path / f"bundle-{seed}")
        assert run("import", tmp_path / f"bundle-{seed}", "--name", NAME).exit_code == 0
    assert shares.of(NAME) == ["rival-2"]


def test_collect_garbage(run: Run, store: AdapterStore) -> None:
    store.publish(make_bundle(1), NAME)
    data = make_bundle(2).to_bytes()
    bundle_path(store, make_bundle(2).digest).write_bytes(data)
    assert fields(run("collect-garbage", "--json")) == {"bundles_freed": 1, "bytes_freed": len(data)}
    assert run("collect-garbage").stdout == "0 bundles removed; 0 bytes freed\n"
    store.check_integrity()


def assert_refused(result: Result, text: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    # A table may come first, and no progress of transformers: this is no terminal.
    assert result.stderr.count("sera-serve: ") == 1
    assert "%|" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("sera-serve: ")
    assert text in last


def test_refusals_are_one_line_and_exit_1(run: Run, store: AdapterStore, tmp_path: Path) -> None:
    store.publish(make_bundle(), NAME)
    (tmp_path / "junk").write_bytes(b"PK\x03\x04 something")
    assert_refused(run("inspect", "no/body"), "not in the store")
    assert_refused(run("inspect", "../etc"), "tenant is '..'")
    assert_refused(run("list", at=tmp_path / "absent"), "is not an adapter store")
    assert_refused(run("import", tmp_path / "junk", "--name", NAME), "zip archive")
    assert_refused(run("import", tmp_path / "nothing", "--name", NAME), "not a regular file")
    assert_refused(run("import", tmp_path / "junk", "--name", "x"), "write tenant/name")
    assert_refused(run("export", NAME, "--output", tmp_path / "junk"), "exists")
    assert_refused(run("export", NAME, "--output", tmp_path / "junk" / "deeper"), "junk")
    merged = run("export", NAME, "--format", "merged", "--base", tmp_path / "no", "--output", tmp_path / "out")
    assert_refused(merged, "could not be loaded")


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", NAME, "--format", "merged", "--output", "out"),
        ("export", NAME, "--format", "sera", "--base", "embedded", "--output", "out"),
        ("export", NAME, "--format", "gguf", "--output", "out"),
        ("export", NAME),
        ("import", "somewhere"),
        ("alias", NAME),
        ("frobnicate",),
    ],
)
def test_wrong_usage_exits_2(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_combine_publishes_the_sum_and_says_of_what(run: Run, store: AdapterStore) -> None:
    digests = [store.publish(make_bundle(seed), f"acme/a{seed}").digest for seed in (1, 2)]
    result = fields(run("combine", "acme/a1=0.5", "acme/a2@v1=-2", "--name", "acme/both", "--json"))
    assert (result["adapter"], result["version"]) == ("acme/both", 1)
    total = store.load(result["digest"])
    want = combine([make_bundle(1), make_bundle(2)], [0.5, -2.0])
    assert all(torch.equal(total.tensors[name], tensor) for name, tensor in want.tensors.items())
    assert total.config.training == {
        "combination": [
            {"adapter": "acme/a1@v1", "digest": digests[0], "weight": 0.5},
            {"adapter": "acme/a2@v1", "digest": digests[1], "weight": -2.0},
        ]
    }


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["acme/a1"], "write tenant/name=weight"),
        (["acme/a1=x"], "write tenant/name=weight"),
        (["acme/a1=nan"], "finite"),
        (["acme/a1=1", "acme/none=1"], "acme/none"),
        (["acme/a1=1", "acme/sorter=1"], "task of acme/sorter@v1"),
    ],
)
def test_combine_refuses(run: Run, store: AdapterStore, parts: list[str], reason: str) -> None:
    store.publish(make_bundle(1), "acme/a1")
    store.publish(make_classifier(), "acme/sorter")
    result = run("combine", *parts, "--name", "acme/both")
    assert result.exit_code == 1
    assert reason in result.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, PEFT checkpoint) on disk."""
    folder = tmp_path_factory.mktemp("peft")
    base = random_decoder()
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    return folder / "base", save_checkpoint(base.model, folder / "adapter")


def test_a_peft_checkpoint_is_imported(run: Run, store: AdapterStore, checkpoint: tuple[Path, Path]) -> None:
    base, adapter = checkpoint
    assert_refused(run("import", adapter, "--name", NAME), "give --base")
    result = run("import", adapter, "--name", NAME, "--base", base, "--json")
    assert fields(result)["version"] == 1
    config = store.config(store.resolve(NAME).digest)
    assert (config.method, config.base.name) == ("lora", "base")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"max_length": 1 << 20}, "max_length is 1048576, and base"), ({"rank": 320}, "the rank 320 of")],
)
def test_a_bundle_that_no_server_of_its_base_serves_is_refused(
    changes: dict[str, int], words: str, run: Run, checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    base = load_base(str(checkpoint[0]))
    path, (d_in, d_out) = next(iter(base.module_shapes().items()))
    spec = {**MODULE, "d_in": d_in, "d_out": d_out, "split": 1, "rank": changes.get("rank", 4)}
    wrong = classifier_fields(base=base.info.model_dump(), modules={path: spec}, max_length=changes.get("max_length"))
    fill(AdapterConfig.from_json(json.dumps(wrong))).save(tmp_path / "bundle")
    assert_refused(run("import", tmp_path / "bundle", "--name", NAME, "--base", checkpoint[0]), words)


def test_a_checkpoint_is_compressed(run: Run, store: AdapterStore, checkpoint: tuple[Path, Path]) -> None:
    base, adapter = checkpoint
    importing = ("import", adapter, "--name", NAME, "--base", base)
    assert_refused(run(*importing, "--compress", "split=4"), "raise --max-error")
    assert_refused(run(*importing, "--compress", "rank=4"), "write split=4")
    result = run(*importing, "--compress", "split=4,rank=16")
    assert result.exit_code == 0, result.output
    assert "relative error" in result.stderr
    assert "q_proj" in result.stderr
    spec = next(iter(store.config(store.resolve(NAME).digest).modules.values()))
    assert (spec.split, spec.rank, spec.use_mixer) == (4, 16, True)
    # A rank that nobody gave is that of the layer, rounded up to a multiple of the split.
    result = run(*importing, "--compress", "split=16", "--max-error", "1")
    assert result.exit_code == 0 and re.search(r"q_proj \D*16 ", result.stderr), result.stderr
    # A number that would be ignored, and one that no error is above.
    for options, reason in (
        (("--max-error", "0.5"), "only --compress reads it"),
        (("--max-error", "nan"), "it is nan"),
    ):
        compress = () if "only" in reason else ("--compress", "split=4")
        result = run(*importing, *compress, *options)
        assert result.exit_code == 2 and reason in result.stderr, result.output
    assert store.resolve(NAME).version == 2


def test_the_help_shows_the_defaults_of_a_compression(run: Run) -> None:
    text = " ".join(run("import", "--help").output.replace("│", " ").split())
    assert "that is accepted. [default: 0.1]" in text


def test_a_hub_id_without_a_network(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_refused(run("import", "someone/no-such-adapter", "--name", NAME), "hf download someone/no-such-adapter")
    assert_refused(run("import", "some--one/adapter", "--name", NAME), "neither a path nor a repository of the hub")


@pytest.mark.parametrize(("inside", "downloads"), [("", 1), ("adapter", 2)])
def test_folders_of_a_hub_s_repository_are_fetched_only_without_an_adapter_at_the_top(
    inside: str, downloads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        for name in (f"{inside}/adapter_config.json".lstrip("/"), "checkpoint-1/adapter_config.json"):
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert imports._downloaded("someone/adapter") == str(tmp_path)
    assert len(asked) == downloads
    assert not any("*" in pattern for pattern in asked[0])
    assert (tmp_path / "checkpoint-1").exists() == (downloads == 2)
