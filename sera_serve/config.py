"""Settings of the server: from flags, a YAML file, or `SERA_SERVE_*` environment variables."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from sera_serve.access import checked_quotas
from sera_serve.errors import InvalidConfiguration
from sera_serve.quantization import Quantize
from sera_serve.strict_yaml import NotYaml, load_yaml

_ENV_PREFIX = "SERA_SERVE_"
# The host takes as long for a pass of a GPU's layers with 512 tokens as with a few.
_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 512, 2048
_ENDPOINT = re.compile(r"https?://[^\s/]")
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?", re.ASCII)

# https://kubernetes.io/docs/concepts/services-networking/service/ (environment variables)
_KUBERNETES = re.compile(
    r"([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_[A-Z]+)?)?)"
)

RELOADED = frozenset({"quotas", "tenant_weights"})
"""The settings that a running server reads again on SIGHUP."""


class ServeSettings(BaseSettings):
    """Every setting of the server and its engine. Flags win over the environment, the environment over defaults."""

    model_config = SettingsConfigDict(env_prefix=_ENV_PREFIX, extra="forbid", frozen=True, allow_inf_nan=False)

    base: str = Field("embedded", description='"embedded", a folder in Hugging Face format, or a hub id')
    store: Path = Field(Path("store"), description="folder of the adapter store")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    device: str = Field(
        "cpu", description="torch device of the base: cpu, cuda, or one of several GPUs, such as cuda:1"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of base and adapters; auto means float32 on a CPU, the checkpoint's own elsewhere",
    )
    quantize: Quantize = Field(
        "none",
        description="what the base's linear layers are kept in: nf4 (bitsandbytes), int8 or int4 (torchao); none means "
        "in dtype. Adapters of the base run on the quantized base too",
    )
    cpu_threads: int = Field(0, ge=0, le=1024, description="threads of a forward pass on a CPU; 0 means one a core")
    gpu_memory_fraction: float = Field(
        0.9, gt=0, le=1, description="share of a GPU's memory that the server may use in all; no effect on a CPU"
    )
    pool_mib: int | None = Field(
        None,
        ge=1,
        le=1 << 30,
        description="device memory for adapters, MiB; by default 256 on a CPU, and a fifth of what the weights leave "
        "on a GPU",
    )
    max_resident: int = Field(1024, ge=1, le=1 << 24, description="most adapters on the device at once")
    host_cache_mib: int = Field(1024, ge=0, description="host memory for adapters, MiB")
    attention: Literal["auto", "triton", "torch", "flash-attn", "flashinfer"] = Field(
        "auto",
        description="what computes attention; auto means triton on CUDA, torch elsewhere; flash-attn and flashinfer "
        "compute prompts, with triton for the rest",
    )
    kv_cache_tokens: int | None = Field(
        None,
        ge=64,
        le=1 << 40,
        description="tokens in the KV cache; by default 32768 on a CPU, and all that fit on a GPU",
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of one forward pass; longer prompts are computed in chunks; by default 512 on a CPU, "
        "and 2048 on a GPU",
    )
    max_sequences: int = Field(256, ge=1, description="most sequences of one forward pass")
    cuda_graphs: bool = Field(
        True,
        description="on a GPU, capture most steps as CUDA graphs at start, and short classification passes when they "
        "first come; false starts sooner and runs slower",
    )
    stream_interval: int = Field(
        1,
        ge=1,
        le=1024,
        description="tokens of one event of a stream, but for the first and the last; with more, many streams take "
        "less of the server's processor",
    )
    classify_max_batch: int = Field(32, ge=1, description="most inputs of one classification pass")
    classify_max_wait_ms: float = Field(
        20,
        ge=0,
        description="wait after which an input takes precedence over fuller classification passes, milliseconds",
    )
    max_queue: int = Field(
        1024, ge=1, description="most requests waiting or running; further requests are answered 503"
    )
    max_queue_per_tenant: int = Field(
        512, ge=1, description="most requests of one tenant waiting or running; further requests are answered 429"
    )
    tenant_weights: Annotated[dict[str, float], NoDecode] = Field(
        {},
        description='shares by tenant, such as "acme=2,_base=0.5" or a mapping in YAML; all other tenants have 1',
    )
    quotas: Annotated[dict[str, dict[str, Any]], NoDecode] = Field(
        {},
        description='limits by tenant, in the settings file, such as "acme: {requests_per_minute: 600}"; the tenant '
        '"*" is every other one; `sera-serve quotas` sets limits that come first',
    )
    max_upload_mib: int = Field(1024, ge=1, description="largest adapter bundle accepted, MiB")
    max_body_mib: int = Field(1, ge=1, description="largest JSON body accepted, MiB")
    max_image_bytes: int = Field(10 << 20, ge=1, description="largest image file accepted, bytes")
    max_image_pixels: int = Field(
        1 << 24, ge=1, le=89_000_000, description="most pixels of an image, width times height"
    )
    max_images: int = Field(64, ge=1, le=1024, description="most images of one request")
    max_uploads: int = Field(
        8,
        ge=1,
        description="most uploads under way at once, of one tenant half as many; further uploads are answered 503",
    )
    max_connections: int = Field(1000, ge=1, description="most open connections; further ones are answered 503")
    max_connections_per_address: int = Field(
        500, ge=1, description="most open connections of one client address; raise it behind a proxy"
    )
    max_header_kib: int = Field(32, ge=1, description="most bytes of a request's line and headers, KiB")
    header_timeout_s: float = Field(
        10, gt=0, description="longest time for a request's line and headers to arrive, seconds; then 408"
    )
    body_timeout_s: float = Field(
        10, gt=0, description="time for a body to arrive, seconds, on top of the time at the least rate; then 408"
    )
    min_body_kib_s: float = Field(16, gt=0, description="least rate at which a body must arrive, KiB a second")
    upload_timeout_s: float = Field(900, gt=0, description="longest time for an upload to arrive, seconds; then 408")
    write_timeout_s: float = Field(
        60, gt=0, description="longest time that a client may leave its response unread, seconds; then disconnected"
    )
    allowed_origins: Annotated[list[str], NoDecode] = Field(
        [],
        description='web origins whose pages may change the store, such as "https://console.example.com", or "*"',
    )
    allowed_hosts: Annotated[list[str], NoDecode] = Field(
        [],
        description='names that clients may use for this server in the Host header, or "*"; by default a server that '
        "listens on a loopback address answers to loopback names and IP addresses alone, any other to every name",
    )
    auth: Literal["auto", "keys", "off"] = Field(
        "auto",
        description="who needs a key: auto means everyone, except on a loopback address as long as no key was made; "
        "keys means everyone; off means nobody",
    )
    insecure: bool = Field(False, description="allow auth off on an address that others can reach")
    audit_max_mib: int = Field(64, ge=1, description="size at which a new file of the audit log begins, MiB")
    audit_keep: int = Field(8, ge=1, le=100, description="older files of the audit log that are kept")
    metrics_address: str | None = Field(
        None, description='address of its own for /metrics, such as "127.0.0.1:9100"; by default the server\'s own'
    )
    metrics_label_limit: int = Field(
        200,
        ge=1,
        description="most tenants, and most adapters, with a label of their own in the metrics; "
        "one tenant's adapters take half at most",
    )
    log_format: Literal["text", "json"] = Field("text", description="lines of the log: for people, or one JSON each")
    access_log: bool = Field(True, description="log a line for each request")
    slow_request_s: float | None = Field(
        None, ge=0, description="log a warning for each request that takes longer, seconds; by default for none"
    )
    otel_endpoint: str | None = Field(
        None,
        description='where traces go by OTLP over HTTP, such as "http://localhost:4318"; by default where '
        "OTEL_EXPORTER_OTLP_ENDPOINT says, and nowhere without it",
    )
    log_prompts: int = Field(
        0, ge=0, le=65536, description="most bytes of a request's body that its line in the log has; 0 logs no prompt"
    )
    shutdown_grace_s: int = Field(30, ge=0, description="time for requests in flight to finish after SIGTERM, seconds")
    watch: Path | None = Field(
        None,
        description="directory of adapters: what appears there as tenant/name is published, what vanishes is withdrawn",
    )
    lora_path_root: Path | None = Field(
        None,
        description="directory below which /v1/load_lora_adapter may load paths; by default that route is off. "
        "With keys, a tenant loads from the directory of its own name there",
    )
    drain_s: float = Field(
        0,
        ge=0,
        description="after SIGTERM, time in which /readyz answers 503 and connections are still accepted, seconds; "
        "as long as a load balancer takes to notice",
    )
    max_training_jobs: int = Field(1, ge=0, le=64, description="most training jobs that run at once; with 0 they wait")
    max_training_file_mib: int = Field(64, ge=1, description="largest training file accepted, MiB")
    max_training_files_mib: int = Field(1024, ge=1, description="most bytes of all training files of a tenant, MiB")
    training_job_timeout_s: float | None = Field(
        86400,
        gt=0,
        description="longest time that the process of one training job runs, seconds; then the job fails. A server "
        "that starts again counts anew",
    )
    training_threads: int = Field(1, ge=1, le=1024, description="threads of one training job")
    training_gpu_memory_fraction: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of a GPU's memory that one training job may use; with gpu_memory_fraction at most 1 in all",
    )
    request_timeout_s: float = Field(60, gt=0, description="longest wait until a request starts, seconds; then 503")

    @property
    def batch_tokens(self) -> int:
        """The most tokens of one forward pass, on this device."""
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        return _CPU_BATCH_TOKENS if self.device == "cpu" else _GPU_BATCH_TOKENS

    @field_validator("store", mode="before")
    @classmethod
    def _store_is_named(cls, value: Any) -> Any:
        # Path("") is the current directory.
        if value == "":
            raise ValueError("it must be the path of a folder; leave the setting out for the default, or write .")
        return value

    @field_validator("watch", "lora_path_root", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        # An empty variable, as of ${WATCH:-}, must not open the current directory; and it turns a file's line off.
        return None if value == "" else value

    @field_validator("watch")
    @classmethod
    def _check_watch(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and (store := info.data.get("store")) is not None:
            watched, kept = Path(os.path.realpath(value)), Path(os.path.realpath(store))
            if watched.is_relative_to(kept) or kept.is_relative_to(watched):
                # The store's own files would be published as adapters of tenants of the names of its folders.
                raise ValueError(
                    f"the store is {str(store)!r}, and neither may lie in the other; name another directory"
                )
        return value

    @field_validator("auth", mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        # YAML takes a bare off for false.
        return "off" if value is False else value

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError("write cpu, cuda, or cuda:N for one of several GPUs, such as cuda:1")
        return value

    @field_validator("otel_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None and not _ENDPOINT.match(value):
            raise ValueError('write a URL, such as "http://localhost:4318"; leave the setting out for no traces')
        return value

    @field_validator("allowed_origins", "allowed_hosts", mode="before")
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("quotas", mode="before")
    @classmethod
    def _read_quotas(cls, value: Any) -> Any:
        try:
            return checked_quotas(load_yaml(value) if isinstance(value, str) else value)
        except NotYaml as error:
            raise ValueError(f"it is not YAML: {error}") from error
        except InvalidConfiguration as error:
            raise ValueError(error.message) from error

    @field_validator("tenant_weights", mode="before")
    @classmethod
    def _read_weights(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [pair.split("=") for pair in value.split(",") if pair.strip()]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("write tenant=weight,tenant=weight")
        weights = {tenant.strip(): weight for tenant, weight in pairs}
        if len(weights) < len(pairs):
            raise ValueError("a tenant has two weights; write each tenant once")
        return weights

    @field_validator("tenant_weights")
    @classmethod
    def _check_weights(cls, value: dict[str, float]) -> dict[str, float]:
        for tenant, weight in value.items():
            if not tenant or "/" in tenant:
                raise ValueError(f"{tenant!r} is no tenant: write the part of an adapter's name before its '/'")
            if weight <= 0:
                raise ValueError(f"the weight of {tenant} is {weight}; it must be positive")
        return value


def load_settings(config: Path | None, flags: Mapping[str, Any]) -> ServeSettings:
    """Read each setting from the first source that has it: flags, `SERA_SERVE_*` variables, a YAML file, defaults.

    Args:
        config: YAML file whose keys are the names of the settings, or None.
        flags: Values by name; None means not given.

    Raises:
        InvalidConfiguration: The file cannot be read, or a setting is unknown or has an impossible value.
    """
    return load_with_sources(config, flags)[0]


def load_with_sources(config: Path | None, flags: Mapping[str, Any]) -> tuple[ServeSettings, dict[str, str]]:
    """As `load_settings`, and by setting where its value is from: a flag, a variable, the file, or its default.

    The file is read once: it may be a pipe, and it may change meanwhile.

    Raises:
        InvalidConfiguration: As `load_settings`.
    """
    known = list(ServeSettings.model_fields)
    content = _read_file(config, known)
    variables = _variables(known)
    given = {name: value for name, value in flags.items() if value is not None}
    sources = dict.fromkeys(known, "default")
    sources |= dict.fromkeys(content, f"file {config}")
    sources |= {name: f"variable {variable}" for name, variable in variables.items()}
    sources |= {name: f"flag {_flag(name)}" for name in given}
    try:
        # What is not given here, pydantic reads from the variables.
        return ServeSettings(**{n: value for n, value in content.items() if n not in variables} | given), sources
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        problem = first["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
        where = sources[name] if name in given else f"{sources[name]}; flag {_flag(name)}"
        raise InvalidConfiguration(f"{name} ({where}) is {first['input']!r}: {problem}", param=name) from error


def _variables(known: list[str]) -> dict[str, str]:
    """The variable of each setting that has one, in the case in which it is written: pydantic takes either."""
    found = {}
    for variable in sorted(os.environ):
        if not variable.upper().startswith(_ENV_PREFIX):
            continue
        name = variable[len(_ENV_PREFIX) :]
        if _KUBERNETES.fullmatch(name) and (name != "PORT" or "://" in os.environ[variable]):
            raise InvalidConfiguration(
                f"environment variable {variable} is Kubernetes' own, for a Service whose name begins with sera-serve; "
                "set enableServiceLinks: false in the pod's spec, or give the Service another name",
                param=variable,
            )
        if name.lower() not in known:
            raise InvalidConfiguration(
                f"environment variable {variable}: {_unknown(name.lower(), known)}", param=variable
            )
        found[name.lower()] = variable
    return found


def _read_file(config: Path | None, known: list[str]) -> dict[str, Any]:
    """Return the settings in a file; none without a file."""
    if config is None:
        return {}
    try:
        content = load_yaml(config.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, NotYaml) as error:
        raise InvalidConfiguration(f"--config {config} cannot be read: {error}", param="config") from error
    if not isinstance(content, dict):
        raise InvalidConfiguration(f"--config {config} must hold `setting: value` lines", param="config")
    for name in content:
        if name not in known:
            raise InvalidConfiguration(f"--config {config}: {_unknown(str(name), known)}", param=str(name))
    return content


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no setting {name!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"they are {', '.join(known)}"
    )
