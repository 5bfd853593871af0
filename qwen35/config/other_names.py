"""What other trainers call a setting, so that a message can name ours.

The names are those of transformers' TrainingArguments, LLaMA-Factory, ms-swift, Megatron-LM and
MindSpeed-MM.
"""

from qwen35.config.schema import TRAIN_SET, VALIDATION_SET

BASIC, IMAGES = f"{TRAIN_SET}.basic_parameters", f"{TRAIN_SET}.preprocess_parameters"
SAME = {  # ours -> theirs
    f"{BASIC}.dataset": "train_dataset train_file train_files train_data data_path dataset_name dataset_path datasets",
    f"{BASIC}.dataset_dir": "media_dir image_dir image_folder data_dir",
    f"{BASIC}.cache_dir": "tokenized_path cached_dataset",
    f"{BASIC}.max_samples": "max_train_samples",
    f"{BASIC}.cutoff_len": """max_length max_seq_length max_seq_len model_max_length max_model_len seq_length seq_len
        packing_length sequence_length""",
    f"{BASIC}.truncation": "truncation_strategy",
    f"{TRAIN_SET}.attr": "columns tags",
    f"{TRAIN_SET}.attr.format": "formatting",
    f"{TRAIN_SET}.attr.bbox_format": "qwenvl_bbox_format",
    f"{IMAGES}.image_max_pixels": "max_pixels image_resolution",
    f"{IMAGES}.image_min_pixels": "min_pixels",
    f"{IMAGES}.video_fps": "fps",
    f"{IMAGES}.video_maxlen": "fps_max_frames max_frames nframes",
    f"{VALIDATION_SET}.basic_parameters.dataset": "val_dataset eval_dataset validation_file eval_file",
    "data.dataloader_param.num_workers": "dataloader_num_workers",
    "data.dataloader_param.shuffle": "train_dataloader_shuffle dataset_shuffle disable_shuffling",
    "model.model_name_or_path": """model model_name_or_path model_id model_path model_dir base_model model_name
        pretrained_model_name_or_path hf_path""",
    "model.freeze": """freeze_vit freeze_llm freeze_aligner freeze_vision_tower freeze_multi_modal_projector
        freeze_language_model freeze_parameters freeze_parameters_regex freeze_trainable_layers freeze_trainable_modules
        trainable_parameters freeze_vision_model freeze_vision_projection""",
    "model.kernels": """flash_attn attn_implementation attn_impl attention_backend use_flash_attn use_liger_kernel
        enable_liger_kernel experts_implementation experts_impl moe_grouped_gemm use_grouped_expert_matmul gdn_implementation
        use_triton_gdn causal_conv1d_implementation""",
    "model.loss_cfg.router_aux_loss_coef": "moe_aux_loss_coef moe_aux_loss_coeff",
    "parallel.fully_shard_parallel_size": "deepspeed fsdp fsdp_config zero_stage use_megatron_fsdp dp_shard_size",
    "parallel.expert_parallel_size": "expert_model_parallel_size ep_size ep",
    "parallel.ulysses_parallel_size": """sequence_parallel_size context_parallel_size ring_attention_size sp_size cp_size
        ulysses_size cp""",
    "parallel.recompute": """gradient_checkpointing activation_checkpointing vit_gradient_checkpointing recompute_granularity
        recompute_method recompute_num_layers recompute_plan disable_gradient_checkpointing gradient_checkpointing_kwargs""",
    "parallel.activation_offload": "enable_activation_offload activation_offload_plan cpu_offloading",
    "training.save": "output_dir save_dir checkpoint_dir save_path",
    "training.train_epochs": "num_train_epochs max_epochs num_epochs epochs",
    "training.train_iters": "max_steps total_steps train_steps",
    "training.micro_batch_size": "per_device_train_batch_size per_gpu_train_batch_size train_micro_batch_size_per_gpu",
    "training.gradient_accumulation_steps": "gradient_accumulation accumulate_grad_batches grad_accum_steps",
    "training.optimizer": "optim",
    "training.lr": "learning_rate",
    "training.min_lr": "lr_min min_learning_rate",
    "training.lr_by_module": "vit_lr aligner_lr lr_scaling_plan",
    "training.lr_decay_style": "lr_scheduler_type lr_scheduler",
    "training.lr_warmup_ratio": "warmup_ratio lr_warmup_fraction",
    "training.adam_eps": "adam_epsilon",
    "training.clip_grad": "max_grad_norm gradient_clipping grad_clip",
    "training.neftune_noise_alpha": "neftune_alpha",
    "training.deterministic": "full_determinism use_deter_comp deterministic_mode",
    "training.log_interval": "logging_steps logging_strategy",
    "training.save_interval": "save_steps save_strategy",
    "training.early_stopping_patience": "early_stopping_steps early_stop_interval",
    "training.save_best": "load_best_model_at_end metric_for_best_model greater_is_better",
    "training.expert_balance": "enable_ep_balance ep_balance_plan",
    "training.val_interval": "eval_steps eval_strategy evaluation_strategy eval_interval",
    "training.val_generate": "predict_with_generate",
    "training.async_save": "save_async",
    "training.timeout": "ddp_timeout",
    "training.lora.r": "lora_rank lora_r rank",
    "training.lora.lora_alpha": "alpha",
    "training.lora.target_modules": "lora_target",
    "training.lora.adapter": "adapters adapter_name_or_path pretrained_lora_path",
    "training.stage": "rlhf_type",
    "training.dpo.loss": "pref_loss",
    "training.dpo.beta": "pref_beta",
    "training.dpo.rpo_alpha": "pref_ftx",
    "training.profile": "enable_torch_profiler memory_profile",
}
NOT_THE_SAME = {  # what to say -> theirs
    "it is training.lr_warmup_ratio here, a share of the run's steps": "warmup_steps lr_warmup_iters lr_warmup_steps",
    "it is training.dtype here, bf16 or fp32": "bf16 fp16 fp32 torch_dtype compute_dtype pure_bf16 mixed_precision precision",
    "training.micro_batch_size x training.gradient_accumulation_steps x ranks is what it counts": """global_batch_size
        batch_size train_batch_size""",
    "a validation takes batches of training.micro_batch_size": "per_device_eval_batch_size eval_batch_size",
    f"the validation set is a file of its own, {VALIDATION_SET}.basic_parameters.dataset": "val_size split_dataset_ratio",
    "training.seed is the only one": "data_seed",
    "it is training.optimizer: adamw_swap here": "optimizer_cpu_offload offload_optimizer",
    f"{BASIC}.train_on_prompt and {BASIC}.mask_history say what is trained": "loss_scale train_on_inputs",
    "config.json of the model folder says it": "model_type rope_scaling",
    "a run resumes from training.save by itself, or starts from training.load": """resume_from_checkpoint
        ignore_data_skip resume_only_model overwrite_output_dir""",
    "adapters are trained where training.lora is, else all that model.freeze leaves": """finetuning_type train_type tuner_type
        tuner_backend use_peft lora peft_type""",
    "it is not here: a resume would not be bit for bit, and peft's own adapters of experts refuse it": """lora_dropout dropout
        use_dora""",
    "it is not here: beside adapters all is frozen": "modules_to_save additional_target",
    "it is not here: weights are trained, or frozen, in training.dtype": """quantization_bit quantization_method quant_method
        quant_bits load_in_4bit load_in_8bit use_galore use_badam""",
    "training.stage is sft or dpo": "task_type",
    "it is not here: the arithmetic is bf16 or fp32, the optimizer AdamW": "fp8 fp8_format fp8_recipe use_muon use_adam_mini",
    "samples are always packed": """packing neat_packing use_packed_sequences padding_free group_by_length
        dataloader_drop_last drop_last""",
    f"records are tokenised as a run needs them, and kept where {BASIC}.cache_dir is set": """streaming lazy_tokenize
        preprocessing_num_workers preprocessing_batch_size dataset_num_proc overwrite_cache load_from_cache_file buffer_size""",
    "it is not here: parallel.fully_shard_parallel_size and parallel.expert_parallel_size share the weights": """tp pp tp_size
        pp_size tensor_parallel_size tensor_model_parallel_size pipeline_parallel_size pipeline_model_parallel_size""",
    "training.report_to names trackers, which read their own environment variables": """
        run_name plot_loss logging_dir tensorboard_dir wandb_project use_swanlab swanlab_project""",
    "a checkpoint in training.save has all that a resume needs, and make export makes a model folder of it": """save_only_model
        save_safetensors no_save_optim no_save_rng no_load_optim no_load_rng save_format""",
    "no code of a model folder is ever run": "trust_remote_code",
    "leave it out, there is nothing to choose here": """tf32 do_train do_eval local_rank ddp_backend dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor ddp_find_unused_parameters remove_unused_columns
        use_distributed_optimizer sequence_parallel use_fast_tokenizer torch_compile masked_softmax_fusion
        bias_activation_fusion apply_rope_fusion moe_permute_fusion overlap_grad_reduce overlap_param_gather""",
}
ADVICE = {
    name: advice
    for table in ({f"it is {ours} here": names for ours, names in SAME.items()}, NOT_THE_SAME)
    for advice, names in table.items()
    for name in names.split()
}
