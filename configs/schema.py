"""Every field a run has, with its unit and the reason of its default.

Plain typed dataclasses: OmegaConf refuses unknown keys and wrong types against them; what concerns
more than one field is checked by ``validate.py``. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from triptych.configs.model_schema import ModelConfig


class Precision(Enum):
    """Dtype of weights and activations; master weights and gradients are fp32 in both."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(Enum):
    """What the backward pass computes again instead of keeping it."""

    none = "none"
    selective = "selective"
    full = "full"


class Zero(Enum):
    """Which optimizer shards its state over the data-parallel ranks (ZeRO-1)."""

    megatron = "megatron"
    deepspeed = "deepspeed"


class Kernels(Enum):
    """Where fused kernels come from."""

    auto = "auto"
    torch = "torch"


class Oversize(Enum):
    """What happens to a sample that is longer than a pack. It is never cut."""

    skip = "skip"
    error = "error"


class WeighBy(Enum):
    """What a source's weight is its share of."""

    samples = "samples"
    tokens = "tokens"


class Part(Enum):
    """A part of the model that trains or is frozen as a whole, and has its own learning rate."""

    VIT = "vit"
    ADAPTER = "adapter"
    LLM = "llm"


PARTS = tuple(part.value for part in Part)
"""Their names: the keys of ``StageConfig``, of learning rates and of counts."""


class Horizon(Enum):
    """What a learning rate has reached its end by."""

    budget = "budget"
    """The token budget, whether or not the run is capped."""
    run = "run"
    """The budget or ``train.num_steps``, whichever comes first."""


class Decay(Enum):
    """How a learning rate falls after its warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class PartConfig:
    """Whether one part of the model (vit, adapter or llm) trains in this stage, and how fast."""

    train: bool = MISSING
    lr: float = 0.0
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the horizon."""
    warmup: float = 0.01
    """Share of the horizon over which the rate rises linearly, by a step's share in each; the first
    step has one already, not 0."""
    decay: Decay = Decay.cosine


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One training stage. Learning rates and decay are our defaults; the paper names none."""

    name: str = MISSING
    """Names the mixture in ``data.mixtures`` and the run folder."""
    token_budget: int = MISSING
    """LLM tokens, text and vision, padding not counted, after which the stage is finished."""
    horizon: Horizon = Horizon.budget
    """What warm-up and decay are shares of: budget, so that a capped run is the beginning of the
    whole one; or run, which shrinks the schedule to ``train.num_steps``."""
    vit: PartConfig = field(default_factory=PartConfig)
    adapter: PartConfig = field(default_factory=PartConfig)
    llm: PartConfig = field(default_factory=PartConfig)


class SpikeAction(Enum):
    """What becomes of a step whose loss is a spike."""

    warn = "warn"
    """It updates the weights as any other."""
    skip = "skip"
    """It updates nothing."""
    roll_back = "roll_back"
    """The run goes on from the newest proven checkpoint, and passes over all data since."""


@dataclass(kw_only=True, slots=True)
class SpikesConfig:
    """When a loss is far above those before it, and what is done then."""

    action: SpikeAction = SpikeAction.warn
    """warn, skip or roll_back."""
    sigmas: float = 6.0
    """Standard deviations above the mean of the last ``window`` losses that make a spike."""
    window: int = 100
    """Steps that updated; before there are so many, nothing is a spike."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Size of a step, and how many."""

    num_steps: int | None = None
    """Caps the steps of the stage; the token budget decides when null."""
    global_batch_size: int = 512
    """Packs per step, over all data-parallel ranks and microbatches."""
    micro_batch_size: int = 1
    """Packs that go through the model together, joined into one sequence of segments."""
    seq_len: int = 8192
    """Tokens in a pack."""
    precision: Precision = Precision.bf16
    kernels: Kernels = Kernels.auto
    """auto takes fused ones where they are installed; torch takes only torch's own, to rule the
    others out. Attention follows the same."""
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    deterministic: bool = False
    """On CUDA, kernels that give the same bits each time, slower: only with them is a repeated or
    a resumed run bit-equal. On a CPU it always is."""
    validate_every: int = 0
    """Steps between validation losses; 0 never validates."""
    validation_packs: int = 64
    """Packs of ``data.validation`` that a validation loss is computed on."""
    evaluate_every: int = 0
    """Steps between answers to held-out questions; 0 never asks."""
    evaluation_questions: int = 64
    """Of each source of ``data.evaluation``; they are answered greedily, so each costs a prompt and
    its answer's tokens one by one."""
    profile: str | None = None
    """First and last step that torch's profiler traces, as 20..22, on one rank of each pipeline
    stage; the files are large, so few."""


@dataclass(kw_only=True, slots=True)
class RecomputeConfig:
    """Activation checkpointing, by tower."""

    vit: Recompute = Recompute.none
    """none or full."""
    llm: Recompute = Recompute.none
    """none, selective (the modules named below) or full."""
    modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """What ``llm: selective`` computes again, of each decoder layer: core_attn, mlp."""


@dataclass(kw_only=True, slots=True)
class OverlapConfig:
    """Communication that runs while something is computed. Off, each is easier to debug."""

    grad_reduce: bool = False
    """Reduce-scatter the gradients of a bucket as soon as the backward pass has finished them."""
    param_gather: bool = False
    """All-gather updated weights just before the next step's forward pass needs them."""
    p2p: bool = False
    """Send and receive ahead also while the pipeline fills and drains; needs ``vpp`` above 1, where
    this is always done in between."""
    tp_comm: bool = False
    """Gather and scatter the sequence piece by piece, beside the matrix product of each piece;
    needs ``sequence_parallel``, and on CUDA a tp group that NVLink connects."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism. The data-parallel degree follows: world size / (tp * pp)."""

    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    """Shard norms and residuals of LLM and ViT over the tp ranks, along the sequence."""
    vpp: int = 1
    """Model chunks per pipeline stage; above 1, the schedule is interleaved 1F1B."""
    layout: Any = "auto"
    """Decoder layers of each pipeline stage, as [9,10,10,11]; auto balances cost, ViT included.
    With ``vpp`` chunks: of each stage's first chunk, then of each stage's second, and so on."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One dataset folder."""

    path: str = MISSING
    shards: str | None = None
    """Where its shards lie, as oss://bucket/prefix, s3://, gs:// or az://; null: in the folder."""
    max_epochs: float | None = None
    """How often a stage may go through it, in parts too, as 1.5; null: as often as it takes."""


@dataclass(kw_only=True, slots=True)
class VideoConfig:
    """How many frames of a video are looked at, and how large."""

    fps: float = 2.0
    """Frames per second of the video, while that is from ``min_frames`` to ``max_frames``."""
    min_frames: int = 4
    """Shorter videos are looked at more often, down to every frame that there is."""
    max_frames: int = 768
    """Longer videos are looked at less often."""
    min_pixels: int = 128 * 28 * 28
    """Smaller frames are enlarged to this many pixels, where ``max_tokens`` leaves room."""
    max_pixels: int = 768 * 28 * 28
    """Larger frames are reduced to this many pixels."""
    max_tokens: int = 16384
    """LLM tokens of a video, the paper's; the more frames, the smaller each."""


@dataclass(kw_only=True, slots=True)
class CacheConfig:
    """Frames that stay decoded, for runs that see images and videos more than once."""

    folder: str | None = None
    """On a local disk of each node; its runs may share it. null keeps none."""
    max_gb: float = 100.0
    """10^9 bytes on disk, at most; the oldest frames make way."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Dataset folders, their mixture in each stage, and how samples become packs."""

    tokenizer: str = MISSING
    """Folder of a Hugging Face tokenizer with the Qwen2 special tokens."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    mixtures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage name -> source name -> weight (what ``weigh_by`` says): a float, which ``compose.py``
    sees to, as OmegaConf cannot merge a second file into floats two mappings deep."""
    validation: dict[str, float] = field(default_factory=dict)
    """Source name -> weight, of the packs that validation losses are computed on."""
    evaluation: list[str] = field(default_factory=list)
    """Sources whose chats are asked, up to the assistant's first answer."""
    weigh_by: WeighBy = WeighBy.samples
    """What the weights of ``mixtures`` are shares of; those of ``validation`` are of samples."""
    order: str | None = None
    """FILE.npy with the packs to train on, in their order, instead of a plan by weights; as
    ``launch/prepare.py export-order`` writes."""
    generate: bool = False
    """Make the sample datasets under ``data.root`` first, where they are not there yet."""
    root: str = ""
    """Where ``generate`` writes."""
    min_pixels: int = 56 * 56
    """Smaller images are enlarged to this many pixels."""
    max_pixels: int = 16384 * 28 * 28
    """Larger images are reduced to this many pixels."""
    video: VideoConfig = field(default_factory=VideoConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    max_patches: int = 32768
    """ViT patches in a pack, at most; bounds the memory of stage 0."""
    vision_share: float = 0.5
    """Expected share of the LLM tokens that come from the ViT; only costs are estimated with it."""
    image_patches: int = 1024
    """Expected ViT patches of an image, or of a patch of frames (1024: 448 x 448); only costs are
    estimated with it."""
    window: int = 4096
    """Samples that are packed together; 4096 fill packs to .998 on a broad mixture."""
    oversize: Oversize = Oversize.skip
    accept_new_plan: bool = False
    """Resume although the plan of the data is another than the checkpoint's: the data start anew,
    and the checkpoint records where."""
    requests_per_s: int = 1500
    """To one bucket, by the whole job: OSS gives 2,000 to keys of one prefix, 10,000 to an account;
    above, it refuses. Each node takes its part."""
    max_unreadable: float = 0.001
    """Share of the run's samples that may be unreadable, of at least 10,000; above, it stops."""
    max_unreadable_in_a_row: int = 100
    """Unreadable samples in steps that follow each other and have no readable media."""
    num_workers: int = 2
    """Threads per reading rank that decode media; 0 reads in the training thread, nothing ahead."""
    prefetch_steps: int = 1
    """Steps that are read ahead of training, where threads read."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW. The defaults are ours, not the paper's."""

    zero: Zero = Zero.megatron
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Not applied to biases and norm weights."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 never clips."""


@dataclass(kw_only=True, slots=True)
class InitConfig:
    """Where the weights of a new run come from. A resumed run ignores it."""

    checkpoint: str | None = None
    """Run folder, checkpoint folder or converted Hugging Face model."""
    language: str | None = None
    """Folder of a Qwen2 or Qwen2.5 text model, in place of ``checkpoint``."""
    vision: str | None = None
    """Folder of a CLIP ViT, as transformers or open_clip saves it, or of a Qwen2-VL or Qwen2.5-VL
    model, whose ViT is taken; in place of ``checkpoint``."""
    optimizer_state: bool = False
    """Also carry over the optimizer state of what goes on training."""
    allow_random: bool = False
    """Random weights are accepted where no others are given. Without them, the merger still starts
    from random ones beside ``language`` and ``vision``, as no folder has it."""


@dataclass(kw_only=True, slots=True)
class EfficiencyConfig:
    """Share of ``cluster.peak_tflops`` that each kind of work reaches.

    Their ratios decide the automatic split and the balance of packs: at 1, by FLOPs alone.
    ``benchmarks/calibrate.py`` measures them.
    """

    vit: float = 1.0
    """ViT and merger."""
    linear: float = 1.0
    """Decoder layers, without core attention."""
    attention: float = 1.0
    """Core attention of the decoder layers."""
    head: float = 1.0
    """Logits and loss."""


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """What is known of the machines.

    A run needs the timeout only, and weighs the split of layers and the balance of packs by the
    rest; a plan needs all of it.
    """

    timeout_s: int = 600
    """A collective that takes longer fails on every rank, instead of hanging; rounded up to whole
    minutes for all but the default process group."""
    hang_s: int = 10
    """Seconds beyond three usual steps in which a run that hangs is noticed, explained and ended;
    0 watches for neither hangs nor slow ranks."""
    peak_tflops: float | None = None
    """Dense TFLOP/s of one device at ``train.precision``; MFU is a share of it."""
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    gpus: int | None = None
    """Devices of a run that is planned; a run that is started has as many as it has ranks."""
    gpus_per_node: int | None = None
    memory_gib: float | None = None
    """Memory of one device, as its driver reports it."""
    reserved_gib: float | None = None
    """The part of ``memory_gib`` that is not ours: context, NCCL's buffers, fragmentation."""
    intra_node_gb_s: float | None = None
    """Line rate between devices of a node: 10^9 bytes per second, per device and direction."""
    inter_node_gb_s: float | None = None
    """Line rate between nodes: 10^9 bytes per second, per device and direction."""
    link_efficiency: float | None = None
    """Share of the line rates that collectives reach."""
    latency_us: float | None = None
    """Microseconds that a collective or message takes besides its bytes."""
    measured: list[str] = field(default_factory=list)
    """Keys of this group that were measured on these machines, as [efficiency,link_efficiency].
    What stands on no data sheet and is not named here is reported as assumed."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where the run writes, and how often it saves."""

    dir: str = MISSING
    checkpoint_every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    save_every_minutes: float = 0.0
    """Minutes from one checkpoint to the next, by rank 0's clock, whatever the steps; 0: only
    ``checkpoint_every`` decides."""
    keep: int = 3
    """Newest checkpoints that are kept; the newest after which a loss was finite stays as well."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for ever; 0 keeps none so."""
    weights_every: int = 0
    """Steps between checkpoints of weights only, in ``run.dir/weights``: a seventh of a whole one
    in bf16, a quarter in fp32. All are kept; 0 saves none."""


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """What is logged besides the terminal and ``metrics.jsonl``."""

    every: int = 10
    """Steps between progress lines on the terminal; slow steps get one at least every minute."""
    wandb: bool = False
    wandb_project: str = "triptych"
    wandb_mode: str = "online"
    """online, offline or disabled."""
    wandb_name: str | None = None
    """Of the run; null takes ``run.dir``, which no other run has."""
    wandb_group: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    tensorboard: bool = False


@dataclass(kw_only=True, slots=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init: InitConfig = field(default_factory=InitConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 1234
    """Decides random weights, order and mixture of the data."""
    resume: str = "auto"
    """Where to go on from. auto: the newest good checkpoint in run.dir, if any; never: refuse a
    run.dir that has one; else the path of a checkpoint."""
