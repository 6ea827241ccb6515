"""A run's configuration: nested frozen dataclasses, presets in TOML, strict about names, types and values.

The same names are TOML keys, command-line options (`--training.learning-rate`) and keys of `config.json`.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import tyro
from msgspec import Meta

from rmoe.data.config import DataConfig
from rmoe.errors import RequestError
from rmoe.parallel.config import ParallelConfig
from rmoe.places import PREFIX, expand
from rmoe.validation import AtLeastOne, NotNegative, NotNegativeInt, Share, Text, build, check_fields, require

if TYPE_CHECKING:
    from rmoe.training.run_folder import RunRecord

PRESETS = Path(__file__).parents[1] / "presets"

Rate = Annotated[float, Meta(gt=0, le=sys.float_info.max, description="above 0")]
OFF_OR_TWO = "0, which is off, or 2 or more"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model, by the names of `RMoEConfig`; the vocabulary's comes from the data.

    Attributes:
        hidden_size: `d`, width of the residual stream.
        num_hidden_layers: layers in all.
        num_attention_heads: query heads.
        num_key_value_heads: heads of keys and values; None is as many as query heads.
        head_dim: width of a head; None is `hidden_size / num_attention_heads`.
        num_experts: routed experts of a layer.
        num_experts_per_tok: `k`, experts each token is sent to.
        moe_intermediate_size: width of one expert.
        num_shared_experts: experts every token passes through.
        first_k_dense_replace: so many first layers have a dense MLP instead of experts.
        intermediate_size: width of the dense MLPs; None is `num_experts_per_tok * moe_intermediate_size`.
        mlp_gated: SwiGLU-like experts with a gate matrix, or plain two-matrix ones.
        hidden_act: activation of the experts.
        norm_position: before each block (`pre`) or after the residual sum (`post`).
        norm_type: RMSNorm, or LayerNorm with a bias.
        hidden_dropout: dropout of embeddings and of each block's output.
        attention_dropout: dropout of attention weights.
        tie_word_embeddings: output layer and embedding are one matrix.
        router_aux_loss_coef: weight of the balance losses that do not name their own.
        initializer_range: standard deviation of the normal initialisation.
        dense_gradients: how experts that a token did not choose teach the router; None is not at all.
        erc_loss_coef: weight of the loss that couples each expert with its vector in the router; 0 is off.
        erc_alpha: how much of its answer to its own vector an expert may give to another's.
        competition_rate: share of passes on which a layer's experts choose themselves and teach the router; 0 is off.
        competition_loss_coef: weight of the router's loss on such passes.
    """

    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    num_shared_experts: int = 0
    first_k_dense_replace: int = 0
    intermediate_size: int | None = None
    mlp_gated: bool = True
    hidden_act: str = "silu"
    norm_position: Literal["pre", "post"] = "pre"
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.01
    initializer_range: float = 0.02
    dense_gradients: Literal["densemixer", "default"] | None = None
    erc_loss_coef: float = 0.0
    erc_alpha: float = 1.0
    competition_rate: float = 0.0
    competition_loss_coef: float = 0.001


@dataclass(frozen=True)
class TrainingConfig:
    """How the model is trained. AdamW; without weight decay that is Adam.

    Attributes:
        max_steps: optimizer steps.
        batch_size: sequences per optimizer step, over all devices and micro-batches.
        micro_batch_size: sequences of one forward pass on one device; None is the whole share of a device.
        sequence_length: tokens per sequence.
        learning_rate: the peak.
        router_learning_rate: the peak for recurrences, scorers and what layers share of them; None is `learning_rate`.
        min_learning_rate: where `cosine`, `linear` and `wsd` end, and `wsd` begins its warm-up; a
            `router_learning_rate` ends at the same share of its own peak.
        schedule: after the warm-up. `wsd` is constant, then linear over the last fifth of the steps.
        branch_points: steps of the constant part of `wsd` whose checkpoint stays, for shorter runs to branch from.
        warmup_steps: steps of linear growth from 0 (`wsd`: from `min_learning_rate`); in a run that has no more
            steps than these the rate does not reach its peak, which is said.
        weight_decay: of all but norms and biases, as under transformers' Trainer; a router's temperature has it too.
        adam_beta1, adam_beta2, adam_epsilon: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        seed: of the initial weights, the order of the data, dropout, and routing noise (a stream each).
        threads: CPU threads of torch; None is torch's own choice. Another number can give other last bits.
        device: `auto` takes a GPU where there is one.
        precision: `auto` is bfloat16 mixed precision on a GPU that has it, float32 elsewhere.
        deterministic: only kernels that give the same bits every time.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile: run the model through `torch.compile`.
        max_skipped_batches: how many batches with a NaN or infinite loss or gradient may be left out before
            the run saves everything and stops.
        initial_logit_std: before step 0, scale every layer's scorer so that its raw logits have this standard
            deviation over experts on a fixed batch of training text; None leaves them as they are drawn.
        average: also evaluate the weights averaged over so many of the last steps (LAWA); 0 is off.
        average_every: steps between those averaged; None is the interval of the checkpoints.
    """

    max_steps: AtLeastOne = 200
    batch_size: AtLeastOne = 8
    micro_batch_size: AtLeastOne | None = None
    sequence_length: AtLeastOne = 256
    learning_rate: Rate = 1e-3
    router_learning_rate: Rate | None = None
    min_learning_rate: NotNegative = 0.0
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    branch_points: tuple[int, ...] = ()
    warmup_steps: NotNegativeInt = 20
    weight_decay: Annotated[float, Meta(ge=0, le=sys.float_info.max, description="0 or more, and finite")] = (
        0.0
    )
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Rate = 1e-8
    max_grad_norm: NotNegative = 1.0
    seed: Annotated[int, Meta(ge=0, lt=2**31, description="0 to 2**31 - 1")] = 0
    threads: AtLeastOne | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    deterministic: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False
    max_skipped_batches: NotNegativeInt = 3
    initial_logit_std: Rate | None = None
    average: Annotated[int, Meta(ge=0, description=OFF_OR_TWO)] = 0
    average_every: AtLeastOne | None = None

    def __post_init__(self) -> None:
        check_fields(self, "training")
        self._check_min_learning_rate()
        micro = self.micro_batch_size
        divides = micro is None or self.batch_size % micro == 0
        require(divides, "training.micro_batch_size", micro, f"a divisor of batch_size ({self.batch_size})")
        self._check_wsd()
        # transformers' divides by the steps of the decay
        decays = self.schedule != "linear" or self.warmup_steps < self.max_steps
        require(decays, "training.warmup_steps", self.warmup_steps, f"below max_steps ({self.max_steps})")
        self._check_average()

    @property
    def decay_steps(self) -> int:
        """Steps of the linear decay that ends `wsd`."""
        return max(1, self.max_steps // 5)

    @property
    def constant_steps(self) -> int:
        """Steps of `wsd` before its decay, the warm-up among them."""
        return self.max_steps - self.decay_steps

    def _check_min_learning_rate(self) -> None:
        low, peak = self.min_learning_rate, self.learning_rate
        if self.schedule == "linear":  # transformers' takes no equal ones
            require(low < peak, "training.min_learning_rate", low, f"below learning_rate ({peak:g})")
        elif self.schedule != "constant":  # which never reads it
            require(low <= peak, "training.min_learning_rate", low, f"at most learning_rate ({peak:g})")

    def _check_wsd(self) -> None:
        constant_ends = self.constant_steps
        fits = self.schedule != "wsd" or self.warmup_steps <= constant_ends
        require(
            fits, "training.warmup_steps", self.warmup_steps, f"0 to {constant_ends}, where the decay begins"
        )
        points, allowed = self.branch_points, f"none: schedule {self.schedule} has no constant part"
        if self.schedule == "wsd":
            first = max(1, self.warmup_steps)
            allowed = f"steps of the constant part, {first} to {constant_ends} of {self.max_steps}"
            points = tuple(point for point in points if not first <= point <= constant_ends)
        require(not points, "training.branch_points", ", ".join(map(str, points)), allowed)

    def _check_average(self) -> None:
        require(self.average != 1, "training.average", self.average, OFF_OR_TWO)
        reach = (self.average - 1) * (self.average_every or 1)
        fits = reach < self.max_steps
        require(fits, "training.average", self.average, f"fewer: the run has {self.max_steps} steps")


@dataclass(frozen=True)
class LoggingConfig:
    """What is measured while training, and how often.

    Attributes:
        every: steps between rows of `metrics.jsonl`.
        evaluate_every: steps between evaluations on the validation split; None is a tenth of the run.
        evaluate_blocks: blocks of the validation split used while training; None is the whole split.
        final_blocks: the same for the finished model's figures on the validation and test splits.
        test_blocks: the same for the test split alone; None is as many as `final_blocks`.
        test: evaluate the finished model on the test split too.
        report_to: also log through these, by transformers' names: tensorboard, trackio, wandb, mlflow.
    """

    every: AtLeastOne = 10
    evaluate_every: AtLeastOne | None = None
    evaluate_blocks: AtLeastOne | None = None
    final_blocks: AtLeastOne | None = None
    test_blocks: AtLeastOne | None = None
    test: bool = True
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "logging")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay.

    Attributes:
        every: steps between checkpoints, at most; a run writes at least ten, so None is a tenth of it.
        keep: how many of the newest valid ones stay.
    """

    every: AtLeastOne | None = None
    keep: Annotated[int, Meta(ge=2, description="2 or more: one could be damaged")] = 2

    def __post_init__(self) -> None:
        check_fields(self, "checkpoints")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes.

    Attributes:
        router: a name from `rmoe zoo`, or one that a plugin registers.
        router_option: changes to that router, `stage.option=value`: `recurrence.width=256`.
        plugin: modules (`package.module`) or files (`my_router.py`) that register routers.
        preset: where the defaults came from.
    """

    router: str = "rmoe"
    router_option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    plugin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    preset: Annotated[str, tyro.conf.Suppress] = "quick"

    def __post_init__(self) -> None:
        for name, off in (("average", 0), ("router_learning_rate", None)):
            value = getattr(self.training, name)
            whole = not self.parallel.shards and self.parallel.pipeline == 1
            require(
                value == off or whole, f"training.{name}", value, f"{off} with a model cut up by `parallel`"
            )
        if self.parallel.pipeline > 1:
            self._check_pipeline()
        steps = self.average_steps
        require(
            not steps or min(steps) > 0,
            "training.average",
            self.training.average,
            "fewer, or closer together",
        )

    def _check_pipeline(self) -> None:
        """What a pipeline refuses of a run's settings; what it refuses of a model is in `rmoe.parallel.fit`."""
        require(not self.training.compile, "training.compile", True, "False with parallel.pipeline")
        stages, copies = self.parallel.pipeline, self.parallel.replicate
        batch, micro = self.training.batch_size, self.training.micro_batch_size
        share, why = batch // copies, f"a micro-batch for each of {stages} stages"
        require(share >= stages, "training.batch_size", batch, f"{stages * copies} or more: {why}")
        fits = micro is None or share // micro >= stages
        require(fits, "training.micro_batch_size", micro, f"at most {share // stages}: {why}")

    @property
    def average_steps(self) -> frozenset[int]:
        """The optimizer steps whose weights are averaged."""
        last, every = self.training.max_steps, self.training.average_every or self.checkpoint_interval
        return frozenset(last - every * index for index in range(self.training.average))

    def shorter(self, steps: int) -> RunConfig:
        """Of a run of fewer steps that can branch from this one (`rmoe.training.branch`); it averages no weights.

        Raises:
            RequestError: it would be too short for its warm-up.
        """
        training = replace(self.training, max_steps=steps, branch_points=(), average=0, average_every=None)
        return replace(self, training=training)

    @property
    def test_blocks(self) -> int | None:
        """Blocks of the test split the finished model is evaluated on; None is all."""
        return self.logging.test_blocks or self.logging.final_blocks

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints."""
        tenth = max(1, self.training.max_steps // 10)
        return min(self.checkpoints.every or tenth, tenth)

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations."""
        return self.logging.evaluate_every or max(1, self.training.max_steps // 10)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal configuration back."""
        values: dict[str, Any] = msgspec.to_builtins(dataclasses.asdict(self))
        return values

    @classmethod
    def from_dict(cls, data: object) -> RunConfig:
        """Read `to_dict`'s form; what is left out has its default.

        Raises:
            RequestError: an unknown name, or a value of the wrong type or out of range.
        """
        return build(cls, data)

    @staticmethod
    def preset_names() -> list[str]:
        """The presets that come with the package."""
        return sorted(path.stem for path in PRESETS.glob("*.toml"))

    @classmethod
    def from_preset(cls, name: str) -> RunConfig:
        """The configuration of a preset, or of a `.toml` file of the same form.

        Raises:
            RequestError: no such preset, not TOML, or not a configuration.
        """
        tables = read_preset(name)
        tables.pop("engine", None)  # where a grid of such runs is carried out: `rmoe.compare.engines`
        return cls.from_dict({**tables, "preset": name})

    @classmethod
    def from_run(cls, folder: Path) -> RunConfig | None:
        """The configuration of the run in a folder, to go on with; None where there is no run.

        A folder decides neither which code runs nor where on this machine is written: `plugin` and `data.cache_dir`
        are as if they had not been given. Text and tokenizer are looked for where they may lie now, see
        `run_folder.places_of`; where there are several, by their content.

        Raises:
            RequestError: its `config.json` is not one of a run.
        """
        from rmoe.training.run_folder import CONFIG, read_run

        if not (folder / CONFIG).is_file():
            return None
        record = read_run(folder)
        stored = cls.from_dict(record.config)
        data = _found_again(replace(stored.data, cache_dir=None), folder, record)
        return replace(stored, plugin=(), data=data)

    def setting(self, name: str) -> tuple[str, object]:
        """The dotted name and the value of a setting.

        Args:
            name: dotted, `training.learning_rate`, or the last part alone where no other setting has it.

        Raises:
            RequestError: no such setting, or an ambiguous name.
        """
        values: dict[str, object] = {}
        for key, value in self.to_dict().items():
            if isinstance(value, dict):
                values |= {f"{key}.{leaf}": inner for leaf, inner in value.items()}
            else:
                values[key] = value
        found = [name] if name in values else [full for full in values if full.rpartition(".")[2] == name]
        require(len(found) > 0, "setting", name, ", ".join(sorted(values)))
        require(len(found) == 1, "setting", name, " or ".join(found))
        return found[0], values[found[0]]

    def with_setting(self, name: str, value: object) -> RunConfig:
        """This configuration with one setting changed.

        Args:
            name: as `setting` takes it.
            value: of the setting's type, or text to be read as it.

        Raises:
            RequestError: no such setting, an ambiguous name, or a value that is not allowed.
        """
        data = self.to_dict()
        table, _, leaf = self.setting(name)[0].rpartition(".")
        home = data[table] if table else data
        home[leaf] = Text(value) if isinstance(value, str) else value
        return type(self).from_dict(data)


def read_preset(name: str) -> dict[str, Any]:
    """The tables of a preset, or of a `.toml` file of the same form.

    Raises:
        RequestError: no such preset, or not TOML.
    """
    names = RunConfig.preset_names()
    path = expand(name, "--preset") if name.endswith(".toml") else PRESETS / f"{name}.toml"
    known = (name.endswith(".toml") or name in names) and path.is_file()
    require(known, "--preset", name, f"{', '.join(names)}, or a .toml file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RequestError("--preset", name, f"TOML ({error})") from None


def _found_again(data: DataConfig, folder: Path, record: RunRecord) -> DataConfig:
    """The data of a run with the paths that text and tokenizer have now; unchanged where they are not found."""
    from rmoe.data.ingest import corpus_key
    from rmoe.training.run_folder import places_of

    def places(path: str | None) -> list[str | None]:
        if path is None or path in ("bytes", "words") or path.startswith(PREFIX):
            return [path]
        return [str(place) for place in places_of(path, folder, record)] or [path]

    # A tokenizer of the Hub has a name that may be a folder's, too.
    tokenizers = list(dict.fromkeys([*places(data.tokenizer), data.tokenizer]))
    found = [
        replace(data, path=path, tokenizer=str(tokenizer))
        for path in places(data.path)
        for tokenizer in tokenizers
    ]
    if len(found) == 1:
        return found[0]
    for candidate in found:
        try:
            if corpus_key(candidate) == record.data_sha256:
                return candidate
        except RequestError:
            continue  # another file of the same name
    return data
