"""Options of other tools, drawn from scripts as published: every one has an answer here."""

import re
from pathlib import Path

import pytest

from triptych.configs import compose
from triptych.configs.compose import load_config
from triptych.configs.habits import HABITS
from triptych.configs.overrides import schema_keys
from triptych.errors import ConfigError

GROUPS = {path.name for path in Path(compose.__file__).parent.iterdir() if path.is_dir()}
DRAWN = {
    "LLaMA-Factory, examples/train_full/qwen2_5vl_full_sft.yaml": """
        model_name_or_path image_max_pixels video_max_pixels trust_remote_code do_train
        finetuning_type freeze_vision_tower freeze_multi_modal_projector freeze_language_model
        deepspeed dataset template cutoff_len pad_to_multiple_of max_samples overwrite_cache
        preprocessing_num_workers dataloader_num_workers output_dir logging_steps save_steps
        plot_loss overwrite_output_dir save_only_model report_to per_device_train_batch_size
        gradient_accumulation_steps learning_rate num_train_epochs lr_scheduler_type warmup_ratio
        bf16 ddp_timeout resume_from_checkpoint val_size per_device_eval_batch_size eval_strategy
        eval_steps""",
    "ms-swift, examples/train/multimodal/ocr.sh": """
        dataset train_type torch_dtype num_train_epochs per_device_train_batch_size
        per_device_eval_batch_size learning_rate lora_rank lora_alpha target_modules freeze_vit
        gradient_accumulation_steps eval_steps save_steps save_total_limit logging_steps max_length
        output_dir warmup_ratio dataloader_num_workers""",
    "ms-swift on Megatron, examples/ascend/train/qwen3_vl/moe_full_mindspeed.sh": """
        load_safetensors save_safetensors dataset load_from_cache_file split_dataset_ratio
        tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
        moe_grouped_gemm moe_shared_expert_overlap moe_aux_loss_coeff micro_batch_size
        global_batch_size recompute_granularity recompute_method recompute_num_layers max_epochs
        finetune cross_entropy_loss_fusion lr lr_warmup_fraction min_lr save eval_interval
        save_interval max_length packing num_workers dataset_num_proc no_save_optim no_save_rng
        sequence_parallel moe_expert_capacity_factor attention_backend""",
    "Qwen2.5-VL, qwen-vl-finetune/scripts/sft_7b.sh": """
        deepspeed model_name_or_path dataset_use data_flatten tune_mm_vision tune_mm_mlp tune_mm_llm
        bf16 output_dir num_train_epochs per_device_train_batch_size per_device_eval_batch_size
        gradient_accumulation_steps max_pixels min_pixels eval_strategy save_strategy save_steps
        save_total_limit learning_rate weight_decay warmup_ratio max_grad_norm lr_scheduler_type
        logging_steps model_max_length gradient_checkpointing dataloader_num_workers run_name
        report_to""",
    "Megatron-LM, examples/multimodal/sft_mistral_clip.sh": """
        apply_layernorm_1p attention_softmax_in_fp32 use_checkpoint_args use_distributed_optimizer
        transformer_impl use_te normalization group_query_attention num_query_groups
        no_masked_softmax_fusion num_workers exit_duration_in_mins use_flash_attn
        untie_embeddings_and_output_weights disable_bias_linear position_embedding_type
        rotary_percent rotary_base swiglu attention_dropout hidden_dropout
        tensor_model_parallel_size pipeline_model_parallel_size num_layers hidden_size
        num_attention_heads seq_length max_position_embeddings ffn_hidden_size train_iters
        micro_batch_size global_batch_size lr_decay_iters lr_warmup_fraction lr min_lr
        lr_decay_style log_interval eval_iters eval_interval tokenizer_type tokenizer_model
        data_path valid_path prompt_path save_interval save load pretrained_checkpoint
        dataloader_save split clip_grad weight_decay adam_beta1 adam_beta2 init_method_std
        log_params_norm log_num_zeros_in_grad eod_mask_loss freeze_vit patch_dim img_h img_w
        dataloader_type tensorboard_dir language_model_type disable_vision_class_token
        distributed_timeout_minutes""",
    "torchtitan, tests/integration_tests/base_config.toml": """
        dump_folder description print_args enable_profiling save_traces_folder profile_freq
        enable_memory_snapshot save_memory_snapshot_folder log_freq disable_color_printing
        enable_tensorboard save_tb_folder enable_wandb flavor hf_assets_path lr eps warmup_steps
        decay_ratio decay_type min_lr_factor local_batch_size seq_len max_norm steps dataset
        data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward
        tensor_parallel_degree enable_async_tensor_parallel pipeline_parallel_degree
        context_parallel_degree expert_parallel_degree expert_tensor_parallel_degree interval
        last_save_model_only export_dtype async_mode selective_ac_option components freq""",
}
"""Where from -> its options, without dashes and sections, as they are there."""
NAMES = sorted({name for names in DRAWN.values() for name in names.split()})


def answer(words: list[str]) -> tuple[str, list[str]]:
    """What is refused, and the keys that the remedy names."""
    with pytest.raises(ConfigError, match=r"^1 problem in this run\n") as refused:
        load_config(words)
    told, _, remedy = str(refused.value).partition("  -> try ")
    return told, re.findall(r"([a-z_.]+\w)=", remedy)


@pytest.mark.parametrize("name", NAMES)
def test_an_option_of_another_tool_is_answered_with_a_key_that_exists(name: str) -> None:
    known = {*schema_keys(), *GROUPS}
    told, keys = answer([f"--{name.replace('_', '-')}", "5"])
    assert f"--{name.replace('_', '-')}=5" in told
    assert keys
    assert set(keys) <= known


def test_what_is_drawn_is_looked_up_and_not_guessed() -> None:
    ours = {key.rpartition(".")[2] for key in schema_keys()}
    assert len(NAMES) == 186
    assert [name for name in NAMES if name not in HABITS and name not in ours] == []


def test_a_value_after_an_option_belongs_to_it_and_an_override_does_not() -> None:
    told, keys = answer(["--micro-batch-size", "4", "train.num_steps=3"])
    assert "--micro-batch-size=4 is no option" in told
    assert keys == ["train.micro_batch_size"]
    told, keys = answer(["--bf16", "stage=3"])
    assert "--bf16: there is no key" in told
    told, keys = answer(["stage=3", "--lr_scheduler_type", "cosine"])
    assert keys == ["stage.llm.decay"]
