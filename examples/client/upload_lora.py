"""Uploads a LoRA that PEFT saved, or a bundle, to a running server, and shows the progress.

python examples/client/upload_lora.py path/to/adapter acme/mine
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from sera_serve.client import InvalidAdapterError, SeraClient, SeraError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a directory, or a .safetensors, .tar or .zip file")
    parser.add_argument("name", help="tenant/name to publish it under")
    parser.add_argument("--config", type=Path, help="adapter_config.json, if the source is one .safetensors of PEFT")
    parser.add_argument("--url", default="http://localhost:8000")
    options = parser.parse_args()

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with SeraClient(options.url) as client, Progress(*columns) as bar:
        task = bar.add_task(options.name, total=None)
        try:
            published = client.adapters.upload(
                options.name,
                options.source,
                config=options.config,
                progress=lambda sent, whole: bar.update(task, completed=sent, total=whole),
            )
        except InvalidAdapterError as error:
            raise SystemExit(f"refused: {error.message} ({error.param})") from error
        except (SeraError, OSError, ValueError) as error:
            # A server or a name that is not there; a path that is no file; a folder that is no adapter.
            raise SystemExit(f"not sent: {error}") from error
    for warning in published.warnings:
        print("warning:", warning)
    print(f"published {published.adapter} v{published.version}, digest {published.digest[:12]}")


if __name__ == "__main__":
    main()
