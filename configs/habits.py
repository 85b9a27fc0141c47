"""Keys that people type because other tools call them so, and the key that does it here.

The names are those of transformers' TrainingArguments, LLaMA-Factory, ms-swift, Megatron-LM and
torchtitan, without leading dashes, in lower case with underscores.
"""

from collections.abc import Iterator, Mapping

from triptych.configs.problems import Problem

HABITS: Mapping[str, str] = {
    "model_name_or_path": "init.checkpoint=PATH, what launch/convert.py import wrote",
    "load": "resume=PATH or init.checkpoint=PATH",
    "resume_from_checkpoint": "resume=PATH",
    "output_dir": "run.dir=FOLDER",
    "save": "run.dir=FOLDER",
    "run_name": "run.dir=FOLDER",
    "logging_dir": "run.dir=FOLDER",
    "dataset": "data=NAME, a file in --config-dir FOLDER/data",
    "train_file": "data=NAME, with a dataset that launch/prepare.py wrote",
    "data_path": "data=NAME, with a dataset that launch/prepare.py wrote",
    "template": "data.tokenizer=FOLDER; the chat template is ChatML's",
    "max_steps": "train.num_steps={}",
    "train_iters": "train.num_steps={}",
    "steps": "train.num_steps={}",
    "num_train_epochs": "stage.token_budget=TOKENS, as a stage ends after tokens",
    "epochs": "stage.token_budget=TOKENS, as a stage ends after tokens",
    "per_device_train_batch_size": "train.micro_batch_size={}",
    "per_device_eval_batch_size": "train.micro_batch_size={}",
    "batch_size": "train.global_batch_size={}, of all ranks, or train.micro_batch_size={}",
    "train_batch_size": "train.global_batch_size={}, of all ranks",
    "gradient_accumulation_steps": "train.global_batch_size=PACKS, which divided by "
    "train.micro_batch_size and dp gives the steps",
    "grad_accum": "train.global_batch_size=PACKS, which divided by train.micro_batch_size and dp "
    "gives the steps",
    "cutoff_len": "train.seq_len={}",
    "max_length": "train.seq_len={}",
    "max_seq_length": "train.seq_len={}",
    "model_max_length": "train.seq_len={}",
    "seq_length": "train.seq_len={}",
    "packing": "train.seq_len=TOKENS; everything is packed",
    "max_pixels": "data.max_pixels={}",
    "image_max_pixels": "data.max_pixels={}",
    "min_pixels": "data.min_pixels={}",
    "image_min_pixels": "data.min_pixels={}",
    "learning_rate": "stage.llm.lr={}, stage.vit.lr={} or stage.adapter.lr={}",
    "lr": "stage.llm.lr={}, stage.vit.lr={} or stage.adapter.lr={}",
    "vision_lr": "stage.vit.lr={}",
    "vit_lr": "stage.vit.lr={}",
    "merger_lr": "stage.adapter.lr={}",
    "aligner_lr": "stage.adapter.lr={}",
    "min_lr": "stage.llm.min_lr={}, stage.vit.min_lr={} or stage.adapter.min_lr={}",
    "warmup_ratio": "stage.llm.warmup={}, stage.vit.warmup={} or stage.adapter.warmup={}",
    "warmup_steps": "stage.llm.warmup=SHARE, of the token budget",
    "lr_scheduler_type": "stage.llm.decay={}, constant, linear or cosine",
    "lr_decay_style": "stage.llm.decay={}, constant, linear or cosine",
    "freeze_vit": "stage.vit.train=false",
    "freeze_vision_tower": "stage.vit.train=false",
    "freeze_vision_model": "stage.vit.train=false",
    "freeze_aligner": "stage.adapter.train=false",
    "freeze_multi_modal_projector": "stage.adapter.train=false",
    "freeze_llm": "stage.llm.train=false",
    "freeze_language_model": "stage.llm.train=false",
    "bf16": "train.precision=bf16",
    "fp16": "train.precision=bf16; fp16 is not offered",
    "torch_dtype": "train.precision=bf16",
    "dtype": "train.precision=bf16",
    "gradient_checkpointing": "parallel.recompute.llm=full, and parallel.recompute.vit=full",
    "recompute_granularity": "parallel.recompute.llm={}",
    "activation_checkpoint": "parallel.recompute.llm=full",
    "deepspeed": "optimizer.zero=deepspeed",
    "fsdp": "optimizer.zero=megatron; parameters are split by parallel.tp and parallel.pp",
    "tensor_model_parallel_size": "parallel.tp={}",
    "tensor_parallel_degree": "parallel.tp={}",
    "pipeline_model_parallel_size": "parallel.pp={}",
    "pipeline_parallel_degree": "parallel.pp={}",
    "use_distributed_optimizer": "optimizer.zero=megatron",
    "attn_impl": "train.kernels=auto, which takes flash-attn where it is installed",
    "attn_implementation": "train.kernels=auto, which takes flash-attn where it is installed",
    "flash_attn": "train.kernels=auto, which takes flash-attn where it is installed",
    "weight_decay": "optimizer.weight_decay={}",
    "adam_beta1": "optimizer.beta1={}",
    "adam_beta2": "optimizer.beta2={}",
    "adam_epsilon": "optimizer.eps={}",
    "max_grad_norm": "optimizer.clip_grad={}",
    "clip_grad": "optimizer.clip_grad={}",
    "save_steps": "run.checkpoint_every={}",
    "save_interval": "run.checkpoint_every={}",
    "save_total_limit": "run.keep={}",
    "eval_steps": "train.validate_every={}",
    "eval_interval": "train.validate_every={}",
    "logging_steps": "log.every={}",
    "log_interval": "log.every={}",
    "report_to": "log=wandb or log=tensorboard",
    "wandb_project": "log=wandb log.wandb_project={}",
    "dataloader_num_workers": "data.num_workers={}",
    "num_workers": "data.num_workers={}",
    "data_seed": "seed={}",
    "use_lora": "stage.llm.train=true; adapters such as LoRA are not offered",
    "lora_rank": "stage.llm.train=true; adapters such as LoRA are not offered",
}
"""Name elsewhere -> what to type here; ``{}`` stands for the value that was typed."""


def habit_problems(word: str, key: str, value: str) -> Iterator[Problem]:
    """The problem with a key of another tool, if it is one."""
    name = key.rpartition(".")[2].strip("-").lower().replace("-", "_")
    if name in HABITS:
        yield Problem(f"{word}: there is no key {key}", HABITS[name].replace("{}", value))
