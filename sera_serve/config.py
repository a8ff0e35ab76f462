"""Settings of the server: from flags, a YAML file, or `SERA_SERVE_*` environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServeSettings(BaseSettings):
    """Everything the server and its engine can be told; flags win over the environment, which wins over defaults."""

    model_config = SettingsConfigDict(env_prefix="SERA_SERVE_", extra="forbid", frozen=True)

    base: str = Field("embedded", description='"embedded", a folder in Hugging Face format, or a hub id')
    store: Path = Field(Path("store"), description="folder of the adapter store")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    device: str = Field("cpu", description="torch device of the base, such as cpu or cuda")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of base and adapters; auto is float32 on a CPU, the checkpoint's own elsewhere",
    )
    pool_mib: int = Field(256, ge=1, description="device memory for adapters, MiB")
    max_resident: int = Field(1024, ge=1, description="the most adapters on the device at once")
    host_cache_mib: int = Field(1024, ge=0, description="host memory for adapters, MiB")
    kv_cache_tokens: int = Field(32768, ge=64, description="tokens in the cache of keys and values")
    max_batch_tokens: int = Field(512, ge=1, description="tokens of one forward pass; longer prompts go in chunks")
    max_sequences: int = Field(256, ge=1, description="sequences of one forward pass")
    classify_max_batch: int = Field(32, ge=1, description="inputs of one classification pass")
    max_queue: int = Field(1024, ge=1, description="requests admitted at once; more are answered 503")
    max_upload_mib: int = Field(1024, ge=1, description="largest adapter bundle accepted, MiB")
    request_timeout_s: float = Field(60, gt=0, description="longest wait for an adapter to find room, seconds")
