"""The adapter that a run goes on from: its shape, labels, head and template are kept, and its values are the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, check_base
from sera_serve.base import FrozenBase
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import SeraConfig, attach_layers
from sera_serve.sera_config import Factor
from sera_serve.trainer.methods import METHODS, Method
from sera_serve.trainer.settings import TrainSettings


@dataclass(frozen=True)
class InitialAdapter:
    """A version of an adapter.

    Attributes:
        reference: As the settings name it.
        bundle: Its configuration and tensors.
    """

    reference: str
    bundle: AdapterBundle

    def settings(self, settings: TrainSettings) -> TrainSettings:
        """The settings of a run that goes on from this adapter: its method, trained factors, pooling and length."""
        config = self.bundle.config
        method = method_of(config)
        kept: dict[str, object] = {"method": method, "pooling": config.pooling}
        if (factors := factors_of(config)) != METHODS[method].train_factors:
            kept["train_factors"] = factors
        if settings.max_length is None and config.max_length is not None:
            kept["max_length"] = config.max_length
        return settings.model_copy(update=kept)

    def attach(self, base: FrozenBase, dropout: float) -> None:
        """Attach layers of the adapter's shape to a base. Their values are not the adapter's yet.

        Raises:
            InvalidBundle: The adapter was made for another base.
            InvalidConfiguration: A layer has a scale that no training gives.
        """
        config = self.bundle.config
        check_base(config, base.info, base.module_shapes())
        factors = factors_of(config)
        shapes = {
            path: SeraConfig(
                rank=spec.rank,
                split=spec.split,
                lora_alpha=spec.scaling * spec.rank,
                target_modules=(path,),
                use_mixer=spec.use_mixer,
                dropout=dropout,
                train_factors=factors,
            )
            for path, spec in config.modules.items()
        }
        attach_layers(base.model, shapes)


def method_of(config: AdapterConfig) -> Method:
    """The method that an adapter was trained with. The record may name a variant of the stored method."""
    variants = [name for name, preset in METHODS.items() if preset.stored == config.method]
    return next((name for name in variants if name == config.training.get("method")), config.method)


def factors_of(config: AdapterConfig) -> tuple[Factor, ...]:
    """The factors that an adapter was trained in: those of its record, or the method's own."""
    own = METHODS[method_of(config)].train_factors
    settings = config.training.get("settings")
    recorded = settings.get("train_factors") if isinstance(settings, dict) else None
    # A bundle may come from elsewhere, with anything in its record.
    if isinstance(recorded, list) and recorded and all(factor in own for factor in recorded):
        return cast(tuple[Factor, ...], tuple(recorded))
    return own


def load_initial(settings: TrainSettings) -> InitialAdapter | None:
    """Load the adapter that `settings.init_from` names, or None if it names none.

    Raises:
        AdapterNotFound: There is none.
        InvalidConfiguration: As `check_initial`.
    """
    if settings.init_from is None:
        return None
    store = AdapterStore(settings.store, create=False)
    bundle = store.load(store.resolve(settings.init_from).digest)
    check_initial(settings.init_from, bundle.config, settings)
    return InitialAdapter(settings.init_from, bundle)


def check_initial(reference: str, config: AdapterConfig, settings: TrainSettings) -> None:
    """Check that a run can go on from an adapter.

    Args:
        reference: What messages call it.
        config: Its configuration.
        settings: Options of the run.

    Raises:
        InvalidConfiguration: It is of another task, has labels of the other kind (one or several a text), has parts
            that the trainer does not train, or an option has no meaning for its method.
    """
    if config.task != settings.task:
        raise InvalidConfiguration(
            f"adapter {reference} is for task {config.task}, and this run is for {settings.task}; "
            f"take --task {config.task} with rows for it, or another adapter",
            param="init_from",
        )
    if config.multi_label != settings.multi_label:
        told = "give --multi-label too" if config.multi_label else "leave --multi-label out"
        raise InvalidConfiguration(
            f"a text has {'several labels' if config.multi_label else 'one label'} under adapter {reference}; "
            f"{told}, or take another adapter",
            param="multi_label",
        )
    what = None
    if config.head is not None:
        what = "a hidden layer in its head"
    elif any(spec.has_gain or spec.has_offset for spec in config.modules.values()):
        what = "gains or offsets"
    if what is not None:
        raise InvalidConfiguration(
            f"adapter {reference} has {what}, which cannot be trained further; take another adapter",
            param="init_from",
        )
    settings.check_use(METHODS[method_of(config)], factors_of(config))
