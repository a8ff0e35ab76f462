"""vLLM's kernels from an unpacked wheel's folder: the known layout is loaded, any other is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.setting import SectionSkipped
from benchmarks.gpu.vllm import FILES, FOLDER, load_vllm_kernels


def vllm_tree(folder: Path, shrink: str) -> Path:
    """A wheel's folder in which the three files hold just what is looked for."""
    (folder / FOLDER).mkdir(parents=True)
    contents = dict.fromkeys(FILES, "") | {
        "lora_shrink_op.py": shrink,
        "lora_expand_op.py": "from vllm.utils.torch_utils import direct_register_custom_op\n_lora_expand = 'expand'\n",
        "lora_kernel_metadata.py": "LoRAKernelMeta = 'meta'\n",
        "utils.py": "from vllm import envs\n_LORA_A_PTR_DICT = {}\n_LORA_B_PTR_DICT = {}\n",
    }
    for name, text in contents.items():
        (folder / FOLDER / name).write_text(text)
    return folder


def test_vllm_s_kernels_are_loaded_from_a_wheel_s_folder(tmp_path: Path) -> None:
    shrink = "from vllm.triton_utils import tl, triton\nfrom vllm.platforms import current_platform\n_lora_shrink = 1\n"
    kernels = load_vllm_kernels(vllm_tree(tmp_path, shrink))
    assert (kernels.shrink, kernels.expand, kernels.meta_class) == (1, "expand", "meta")
    assert not any(name.partition(".")[0] == "vllm" for name in sys.modules)


@pytest.mark.parametrize(
    ("shrink", "named"),
    [
        ("from vllm.envs import VLLM_NEW_FLAG\n", "VLLM_NEW_FLAG"),
        ("import vllm.new_module\n", "vllm.new_module"),
        ("lora_shrink_v2 = 1\n", "_lora_shrink"),
    ],
)
def test_another_vllm_is_refused_by_name(tmp_path: Path, shrink: str, named: str) -> None:
    with pytest.raises(SectionSkipped, match=f"does not fit.*{named}"):
        load_vllm_kernels(vllm_tree(tmp_path, shrink))
    assert not any(name.partition(".")[0] == "vllm" for name in sys.modules)


def test_a_folder_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SectionSkipped, match=r"lora_shrink_op\.py is not there"):
        load_vllm_kernels(tmp_path)
