"""Keys that people type because other tools call them so, and the key that does it here.

The names are those of transformers' TrainingArguments, LLaMA-Factory, ms-swift, Qwen's own scripts,
Megatron-LM and torchtitan, without leading dashes, in lower case with underscores.
"""

from collections.abc import Iterator, Mapping

from triptych.configs.problems import Problem

_ANSWERS = {
    # what is trained, from where, into where
    "init.checkpoint=PATH, what launch/convert.py import wrote": "model_name_or_path "
    "hf_assets_path load_safetensors pretrained_checkpoint use_checkpoint_args",
    "init.checkpoint=PATH; every run starts from weights unless init.allow_random=true": "finetune",
    "resume=PATH or init.checkpoint=PATH": "load",
    "resume=PATH": "resume_from_checkpoint",
    "resume=never refuses a run.dir=FOLDER that has checkpoints; none is "
    "overwritten": "overwrite_output_dir",
    "run.dir=FOLDER": "output_dir save run_name logging_dir dump_folder description "
    "save_memory_snapshot_folder save_traces_folder",
    "run.dir=FOLDER; launch/convert.py export writes safetensors": "save_safetensors export_dtype",
    "model=NAME, one of --help or a file in --config-dir FOLDER/model": "flavor "
    "language_model_type",
    "model=NAME; no code of a checkpoint is run": "trust_remote_code",
    "stage=1, stage=2 or stage=3; torchrun launch/pretrain.py always trains": "do_train",
    "stage=1, stage=2 or stage=3, or stage.vit.train=false, stage.adapter.train=false and "
    "stage.llm.train=false by part": "finetuning_type train_type",
    "stage.llm.train=true; adapters such as LoRA are not offered": "use_lora lora_rank lora_alpha "
    "target_modules",
    "stage.vit.train=false": "freeze_vit freeze_vision_tower freeze_vision_model",
    "stage.adapter.train=false": "freeze_aligner freeze_multi_modal_projector",
    "stage.llm.train=false": "freeze_llm freeze_language_model",
    "stage.vit.train={}": "tune_mm_vision",
    "stage.adapter.train={}": "tune_mm_mlp",
    "stage.llm.train={}": "tune_mm_llm",
    # data
    "data=NAME, a file in --config-dir FOLDER/data": "dataset dataset_use split prompt_path",
    "data=NAME, with a dataset that launch/prepare.py wrote": "train_file data_path "
    "dataloader_type dataset_num_proc preprocessing_num_workers load_from_cache_file "
    "overwrite_cache max_samples",
    "data.tokenizer=FOLDER; the chat template is ChatML's": "template",
    "data.tokenizer=FOLDER": "tokenizer_model tokenizer_type",
    "data.max_pixels={}": "max_pixels image_max_pixels",
    "data.min_pixels={}": "min_pixels image_min_pixels",
    "data.video.max_pixels={}": "video_max_pixels",
    "data.video.min_pixels={}": "video_min_pixels",
    "data.video.fps={}": "video_fps fps",
    "data.video.max_frames={}": "video_maxlen fps_max_frames",
    "data.video.min_frames={}": "fps_min_frames",
    "data.max_pixels=PIXELS; pictures keep their shape": "img_h img_w",
    "data.num_workers={}": "dataloader_num_workers num_workers",
    "train.seq_len={}": "cutoff_len max_length max_seq_length model_max_length seq_length",
    "train.seq_len=TOKENS; everything is packed": "packing data_flatten pad_to_multiple_of "
    "eod_mask_loss",
    "train.validate_every=STEPS, on data.validation": "split_dataset_ratio val_size valid_path "
    "eval_strategy",
    "train.validate_every={}": "eval_steps eval_interval freq",
    "train.validation_packs=PACKS": "eval_iters",
    # how long, how fast
    "train.num_steps={}": "max_steps train_iters steps",
    "stage.token_budget=TOKENS, as a stage ends after tokens": "num_train_epochs epochs max_epochs",
    "stage.horizon=run, which ends learning rates with train.num_steps": "lr_decay_iters",
    "train.micro_batch_size={}": "per_device_train_batch_size per_device_eval_batch_size "
    "local_batch_size",
    "train.global_batch_size={}, of all ranks, or train.micro_batch_size={}": "batch_size",
    "train.global_batch_size={}, of all ranks": "train_batch_size",
    "train.global_batch_size=PACKS, which divided by train.micro_batch_size and dp gives the "
    "steps": "gradient_accumulation_steps grad_accum",
    "stage.llm.lr={}, stage.vit.lr={} or stage.adapter.lr={}": "learning_rate lr",
    "stage.vit.lr={}": "vision_lr vit_lr",
    "stage.adapter.lr={}": "merger_lr aligner_lr",
    "stage.llm.min_lr={}, stage.vit.min_lr={} or stage.adapter.min_lr={}": "min_lr",
    "stage.llm.min_lr=RATE, stage.vit.min_lr=RATE or stage.adapter.min_lr=RATE": "min_lr_factor",
    "stage.llm.warmup={}, stage.vit.warmup={} or stage.adapter.warmup={}": "warmup_ratio "
    "lr_warmup_fraction",
    "stage.llm.warmup=SHARE, of the token budget": "warmup_steps",
    "stage.llm.decay={}, constant, linear or cosine": "lr_scheduler_type lr_decay_style decay_type",
    "stage.llm.decay=cosine; decay begins where stage.llm.warmup=SHARE ends": "decay_ratio",
    "optimizer.weight_decay={}": "weight_decay",
    "optimizer.beta1={}": "adam_beta1",
    "optimizer.beta2={}": "adam_beta2",
    "optimizer.eps={}": "adam_epsilon",
    "optimizer.clip_grad={}": "max_grad_norm clip_grad max_norm",
    # precision and kernels
    "train.precision=bf16": "bf16 torch_dtype dtype",
    "train.precision=bf16; fp16 is not offered": "fp16",
    "train.precision=bf16; softmax is in fp32 always": "attention_softmax_in_fp32",
    "train.kernels=auto, which takes flash-attn where it is installed": "attn_impl "
    "attn_implementation flash_attn use_flash_attn attention_backend",
    "train.kernels=auto, which takes fused kernels where they are installed": "transformer_impl "
    "use_te cross_entropy_loss_fusion no_masked_softmax_fusion",
    "train.kernels=auto; torch.compile is not offered": "components",
    # ranks
    "parallel.tp={}": "tensor_model_parallel_size tensor_parallel_degree",
    "parallel.pp={}": "pipeline_model_parallel_size pipeline_parallel_degree",
    "parallel.tp=N with parallel.sequence_parallel=true; context parallelism is not "
    "offered": "context_parallel_degree",
    "parallel.tp=N, parallel.pp=N; all other ranks are data-parallel": "data_parallel_shard_degree "
    "data_parallel_replicate_degree",
    "parallel.tp=N; the language model is dense and has no experts": "expert_model_parallel_size "
    "expert_parallel_degree expert_tensor_parallel_degree moe_aux_loss_coeff moe_grouped_gemm "
    "moe_expert_capacity_factor moe_shared_expert_overlap",
    "parallel.overlap.tp_comm={}": "enable_async_tensor_parallel",
    "parallel.recompute.llm=full, and parallel.recompute.vit=full": "gradient_checkpointing",
    "parallel.recompute.llm={}": "recompute_granularity",
    "parallel.recompute.llm=full": "activation_checkpoint recompute_method recompute_num_layers",
    "parallel.recompute.llm=selective, of "
    "parallel.recompute.modules=[core_attn]": "selective_ac_option",
    "optimizer.zero=deepspeed": "deepspeed",
    "optimizer.zero=megatron; parameters are split by parallel.tp and parallel.pp": "fsdp "
    "fsdp_reshard_after_forward",
    "optimizer.zero=megatron": "use_distributed_optimizer",
    "cluster.timeout_s=SECONDS": "ddp_timeout distributed_timeout_minutes",
    # what is kept and told
    "run.checkpoint_every={}": "save_steps save_interval interval",
    "run.checkpoint_every=STEPS": "save_strategy async_mode dataloader_save",
    "run.checkpoint_every=STEPS; all is saved that a run resumes from": "no_save_optim no_save_rng",
    "run.weights_every=STEPS keeps weights alone, beside checkpoints": "save_only_model "
    "last_save_model_only",
    "run.keep={}": "save_total_limit",
    "train.num_steps=STEPS; a job that is told to end by a signal saves "
    "first": "exit_duration_in_mins",
    "log.every={}": "logging_steps log_interval log_freq",
    "log=wandb or log=tensorboard": "report_to",
    "log=wandb log.wandb_project={}": "wandb_project",
    "log=wandb": "enable_wandb",
    "log=tensorboard": "enable_tensorboard",
    "log=tensorboard, which writes below run.dir=FOLDER": "tensorboard_dir save_tb_folder",
    "log.every=STEPS; loss and norm of each step are in metrics.jsonl": "plot_loss "
    "log_params_norm "
    "log_num_zeros_in_grad disable_color_printing",
    "--print-config; run.dir=FOLDER has config.yaml": "print_args",
    "train.profile=20..22, its first and last step": "enable_profiling profile_freq "
    "enable_memory_snapshot",
    "seed={}": "data_seed",
    # sizes and forms of a model
    "model.language.intermediate_size={}": "ffn_hidden_size",
    "model.language.num_heads={}": "num_attention_heads",
    "model.language.num_kv_heads={}": "num_query_groups",
    "model.language.num_kv_heads=N, below num_heads": "group_query_attention",
    "model.language.rope_theta={}": "rotary_base",
    "model.language.mrope_section=[T,H,W]; positions are M-RoPE's": "position_embedding_type "
    "rotary_percent",
    "model.language.tie_word_embeddings=false": "untie_embeddings_and_output_weights",
    "model.vision.patch_size={}": "patch_dim",
    "model=NAME; the language model is Qwen2's: RMSNorm, SwiGLU, biases of q, k and v, no "
    "dropout": "normalization swiglu disable_bias_linear attention_dropout hidden_dropout "
    "apply_layernorm_1p init_method_std",
    "model=NAME; the ViT has no class token": "disable_vision_class_token",
}
"""What to type here, where ``{}`` stands for the value that was typed -> names elsewhere."""

HABITS: Mapping[str, str] = {name: key for key, names in _ANSWERS.items() for name in names.split()}
"""Name elsewhere -> what to type here."""


def habit_problems(word: str, key: str, value: str) -> Iterator[Problem]:
    """The problem with a key of another tool, if it is one."""
    name = plain_name(key)
    if name in HABITS:
        yield Problem(f"{word}: there is no key {key}", HABITS[name].replace("{}", value))


def plain_name(key: str) -> str:
    """The last part of a key as it would stand here: without dashes, in lower case."""
    return key.rpartition(".")[2].strip("-").lower().replace("-", "_")
