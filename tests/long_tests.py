"""Tests of many seconds whose subject others cover in part: `make test-long` runs them, and so does
continuous integration. By file: a test's name, with an id where only that case is long.

Seconds are processor time on the two-core development machine. To be named here, a test has cheaper
neighbours in `make test`, which fail where the same thing breaks on a simpler layout.
"""

LONG = {
    "tests/benchmarks/test_gpu_call.py": (
        "test_steps_run_here_through_the_engine_and_a_peer_that_fails_is_a_line",  # 47
        "test_the_script_killed_in_a_part_loses_no_earlier_line",  # 8
    ),
    "tests/benchmarks/test_gpu_call_wheels.py": (
        "test_what_is_marked_gpu_is_collected_with_what_such_a_machine_has",  # 56
        "test_the_line_that_is_printed_installs_all_of_it_offline",  # 6
        "test_what_no_index_has_and_what_is_too_large_is_one_line",  # 5
    ),
    "tests/benchmarks/test_peer.py": (
        "test_the_comparison_runs_and_keeps_its_figures",  # 16
    ),
    "tests/checkpoint/test_in_training.py": (
        "test_kills_at_any_moment_of_a_run_that_always_saves",  # 9
        "test_the_same_layout_goes_on_to_the_bit",  # 14
        "test_another_layout_goes_on_with_the_same_rows",  # 15
    ),
    "tests/checkpoint/test_resume_on_layouts.py": (
        "test_every_layout_goes_on_where_another_stopped",  # 59
        "test_context_ranks_go_on_where_others_stopped",  # 29
        "test_bf16_keeps_its_fp32_masters_on_any_layout",  # 13
    ),
    "tests/data_prep/test_rewrite.py": (
        "test_killed_anywhere_the_same_command_ends_the_same[import]",  # 4
        "test_killed_anywhere_the_same_command_ends_the_same[export]",  # 4
        "test_killed_anywhere_the_same_command_ends_the_same[pack]",  # 4
        "test_killed_anywhere_the_same_command_ends_the_same[shuffle]",  # 4
    ),
    "tests/data_prep/test_survey.py": (
        "test_stdin_is_read_by_its_content[/dev/stdin]",  # 6
    ),
    "tests/data_prep/test_tokenize.py": (
        "test_job_killed_at_any_moment_ends_with_the_same_bytes",  # 15
    ),
    "tests/evaluate/test_on_context_ranks.py": (
        "test_every_rank_finds_what_one_process_finds[tensor1-context4-keys-zigzag]",  # 6
        "test_every_rank_finds_what_one_process_finds[tensor2-context2-keys-zigzag]",  # 6
        "test_every_rank_finds_what_one_process_finds[tensor2-context2-auto]",  # 6
        "test_every_rank_finds_what_one_process_finds[tensor1-context4-auto]",  # 5
    ),
    "tests/evaluate/test_on_tensor_ranks.py": (
        "test_every_rank_finds_what_one_process_finds[fused-tensor4]",  # 4
        "test_every_rank_finds_what_one_process_finds[projection-tensor4]",  # 4
        "test_every_rank_finds_what_one_process_finds[split-tensor4]",  # 3
        "test_every_rank_finds_what_one_process_finds[ssmax-tensor4]",  # 2
        "test_every_rank_finds_what_one_process_finds[rnope_swa-tensor4]",  # 3
    ),
    "tests/evaluate/test_sampling.py": (
        "test_draws_follow_the_softmax_at_the_temperature[2.0]",  # 8
        "test_draws_follow_the_softmax_at_the_temperature[0.5]",  # 5
    ),
    "tests/gpu/test_commands.py": (
        "test_a_run_in_bf16_is_stopped_and_gone_on_with_to_the_bit_evaluated_and_sampled[cpu]",
    ),
    "tests/gpu/test_engine.py": (
        "test_the_same_holds_between_two_ways_on_the_cpu[parallel-selective]",  # 9
    ),
    "tests/interop/test_real_model.py": (),
    "tests/interop/test_sampled_text.py": (
        "test_two_hundred_tokens_are_those_of_sample[Cohere]",
        "test_two_hundred_tokens_are_those_of_sample[CohereCompass]",
        "test_two_hundred_tokens_are_those_of_sample[Mistral]",
        "test_two_hundred_tokens_are_those_of_sample[SmolLM3]",
        "test_two_hundred_tokens_are_those_of_sample[Qwen2]",  # 2
        "test_two_hundred_tokens_are_those_of_sample[Qwen3]",  # 2
        "test_two_hundred_tokens_are_those_of_sample[ExaoneMoe]",  # 2
        "test_two_hundred_tokens_are_those_of_sample[Mellum]",  # 2
        "test_two_hundred_tokens_are_those_of_sample[Exaone4]",  # 2
        "test_two_hundred_tokens_are_those_of_sample[Afmoe]",  # 2
        "test_two_hundred_tokens_are_those_of_sample[Olmo3]",  # 2
        "test_two_hundred_tokens_are_those_of_sample[Ministral3]",
        "test_two_hundred_tokens_are_those_of_sample[Flint]",  # 2
        "test_two_hundred_tokens_are_those_of_sample[Gemma3]",  # 2
    ),
    "tests/launch/test_on_slurm.py": (
        "test_failures_are_tried_again_so_often_and_no_more",  # 23
        "test_a_warning_before_the_time_limit_saves_and_comes_back",  # 23
        "test_stop_saves_and_does_not_come_back_until_it_is_wanted",  # 18
        "test_a_mistake_and_a_run_that_must_not_restart_end_the_chain",  # 17
        "test_a_bad_node_is_named_and_a_spare_takes_its_place",  # 7
        "test_a_chain_ends_when_the_run_is_done",  # 9
    ),
    "tests/model/test_chunked_mlp.py": (
        "test_the_engine_trains_an_mlp_in_chunks_at_every_zero_stage",  # 5
    ),
    "tests/model/test_fusion_over_ranks.py": (
        "test_a_share_of_1_or_0_is_the_near_or_the_far_scheme_bit_for_bit[contiguous-keys-keys]",
        "test_a_share_of_1_or_0_is_the_near_or_the_far_scheme_bit_for_bit[zigzag-heads-heads]",
        "test_the_self_test_finds_every_fault_of_two_views_over_ranks",  # 11
    ),
    "tests/model/test_kernels.py": (
        "test_flex_on_cpu_equals_the_reference_without_gradients",  # 9
    ),
    "tests/model/test_kernels_before.py": (
        "test_flex_on_cpu_gives_the_last_rows",  # 20
    ),
    "tests/model/test_selftest.py": (
        "test_a_plan_passes_compiled[bf16-whole]",  # 8
        "test_a_plan_passes_compiled[bf16-no_whole]",  # 4
        "test_a_plan_passes_compiled[fp32-whole]",  # 6
        "test_a_window_and_heads_of_a_real_run_take_seconds",  # 4
    ),
    "tests/model/test_selftest_across_ranks.py": (
        "test_every_fault_is_refused_on_all_ranks_in_the_same_words[bf16-names1]",  # 6
        "test_every_scheme_passes_over_two_ranks",  # 15
    ),
    "tests/parallel/test_pool.py": (
        "test_workers_end_when_the_session_is_killed",  # 2
    ),
    "tests/parallel/test_vocab.py": (
        "test_logits_of_the_batch_are_never_held",  # 6
    ),
    "tests/parity/test_audit.py": (
        "test_the_audit_is_silent_where_nothing_is_broken[zero1]",  # 5
    ),
    "tests/parity/test_context_compiled.py": (
        "test_a_step_through_compiled_regions_is_the_step_as_written",  # 12
    ),
    "tests/parity/test_context_engine.py": (
        "test_five_steps_equal_the_plain_training_loop[ranks8]",  # 17
        "test_bf16_is_no_further_from_the_truth_than_twice_a_single_process",  # 10
        "test_five_steps_equal_the_plain_training_loop[ranks4]",  # 9
        "test_compiled_layers_are_the_plain_ones[heads]",  # 6
        "test_compiled_layers_are_the_plain_ones[fused-heads]",  # 8
        "test_compiled_layers_are_the_plain_ones[fused-keys_zigzag]",  # 6
        "test_five_steps_with_two_views_equal_the_plain_training_loop[ranks2]",  # 12
        "test_five_steps_with_two_views_equal_the_plain_training_loop[ranks4]",  # 8
        "test_compiled_layers_are_the_plain_ones[keys_zigzag]",  # 6
    ),
    "tests/parity/test_context_layers.py": (
        "test_loss_and_every_gradient_equal_the_plain_model[tensor2-context4]",  # 50
        "test_loss_and_every_gradient_equal_the_plain_model[tensor1-context4]",  # 22
        "test_loss_and_every_gradient_equal_the_plain_model[tensor2-context2]",  # 17
    ),
    "tests/parity/test_engine.py": (
        "test_five_steps_equal_the_plain_training_loop[ranks8]",  # 20
        "test_five_steps_equal_the_plain_training_loop[ranks4]",  # 21
        "test_bf16_is_no_further_from_the_truth_than_twice_a_single_process",  # 11
    ),
    "tests/parity/test_layers.py": (
        "test_loss_and_every_gradient_equal_the_plain_model[tensor4]",  # 55
    ),
    "tests/parity/test_trainer.py": (
        "test_what_is_planted_in_a_run_is_seen",  # 42
        "test_a_run_with_changing_rates_equals_the_plain_training_loop[ranks2]",  # 22
    ),
    "tests/report/test_damaged_run.py": (
        "test_one_wrong_value_anywhere_is_one_line_or_a_page",  # 19
    ),
    "tests/report/test_hostile_run.py": (
        "test_pictures_are_drawn_inside_their_folder_whatever_names_say[controls]",  # 7
        "test_pictures_are_drawn_inside_their_folder_whatever_names_say[formula]",  # 6
        "test_pictures_are_drawn_inside_their_folder_whatever_names_say[closing]",  # 5
        "test_in_a_browser_nothing_of_it_runs[element]",  # 7
        "test_in_a_browser_nothing_of_it_runs[attribute]",  # 5
    ),
    "tests/report/test_page.py": (
        "test_many_analyses_are_a_table_and_charts_of_one_length_and_depth",  # 8
        "test_results_of_a_broken_model_are_gaps",  # 7
        "test_several_runs_stand_side_by_side",  # 7
    ),
    "tests/start/test_init_chats.py": (
        "test_the_commands_make_what_the_last_stage_reads[plain]",  # 5
        "test_few_are_not_held_out_and_many_bad_ones_are_allowed_for",  # 5
    ),
    "tests/start/test_notebook.py": (
        "test_it_goes_from_text_to_a_picture",  # 16
    ),
    "tests/study/test_study.py": (
        "test_study_trains_scores_and_goes_on_after_a_kill",  # 13
        "test_branches_wait_for_their_trunk_and_go_on_with_it",
        "test_study_keeps_each_result_once_and_judges_its_rules",  # 16
    ),
    "tests/test_bad_input.py": (
        "test_no_space_for_a_checkpoint_keeps_the_older_ones",  # 16
    ),
    "tests/test_demo_path.py": (
        "test_from_raw_text_to_a_lengthened_context",  # 119
    ),
    "tests/test_hostile_input.py": (
        "test_a_hostile_path_is_refused_in_one_line_by",  # 52
    ),
    "tests/test_torch_of_the_machine.py": (
        "test_a_venv_made_from_a_venv_sees_that_one_s_torch[behind a line of its own]",  # 6
        "test_a_venv_made_from_a_venv_sees_that_one_s_torch[in it]",  # 5
    ),
    "tests/train/listeners/test_wandb.py": (
        "test_an_offline_run_holds_the_reports_tables_and_pictures",  # 6
    ),
    "tests/train/test_anneal.py": (
        "test_a_run_resumed_at_and_inside_a_change_is_the_run_that_was_not_interrupted[tensor2-zero3]",
        "test_a_run_resumed_at_and_inside_a_change_is_the_run_that_was_not_interrupted[single]",
        "test_an_annealed_stage_is_the_stages_it_could_be_written_as",  # 10
    ),
    "tests/train/test_chats.py": (
        "test_killed_in_the_stage_of_chats_it_ends_with_the_same_bits",  # 9
    ),
    "tests/train/test_checkpoint_commands.py": (
        "test_evaluate_repeats_what_the_run_told_at_the_end_of_each_stage",  # 6
    ),
    "tests/train/test_context_features.py": (
        "test_what_is_served_gives_the_run_of_one_rank[spike]",  # 16
        "test_what_is_served_gives_the_run_of_one_rank[looked-at]",  # 11
    ),
    "tests/train/test_context_ranks.py": (
        "test_ranks_tell_once_what_one_process_tells[suite-both]",  # 10
        "test_ranks_tell_once_what_one_process_tells[held_out-context3]",  # 13
    ),
    "tests/train/test_context_run.py": (
        "test_a_run_on_context_ranks_is_that_of_one_rank",  # 41
    ),
    "tests/train/test_data_order.py": (
        "test_rows_do_not_depend_on_the_degrees_nor_on_a_resume",  # 21
        "test_rows_are_what_the_file_says_and_joins_are_marked",  # 19
    ),
    "tests/train/test_guards.py": (
        "test_a_gradient_that_is_no_number_on_one_rank_skips_one_update_on_all[data2-zero3-bf16]",
        "test_a_gradient_that_is_no_number_on_one_rank_skips_one_update_on_all[data2-zero0]",  # 7
        "test_zero_stage_0_is_stage_1_in_loss_norm_and_clipping",  # 6
        "test_a_gradient_that_is_no_number_on_one_rank_skips_one_update_on_all[data2-zero1]",  # 6
        "test_a_gradient_that_is_no_number_on_one_rank_skips_one_update_on_all[tensor2-zero1]",
    ),
    "tests/train/test_launcher.py": (
        "test_a_launch_through_stops_and_kills_is_the_run_that_had_none",  # 31
        "test_the_first_failure_ends_all_ranks[a survivor that traps TERM is killed]",
    ),
    "tests/train/test_repeated.py": (
        "test_another_moment_or_rate_is_told_once_and_the_run_goes_on[a_rate_a_hundredth_higher]",
        "test_another_cursor_ends_the_run_before_anything_is_saved[2]",  # 8
        "test_the_same_steps_are_no_news_on_the_same_layout_or_another",  # 5
        "test_another_moment_or_rate_is_told_once_and_the_run_goes_on[a_moment_lost]",  # 10
        "test_another_cursor_ends_the_run_before_anything_is_saved[1]",  # 5
        "test_another_order_may_be_meant",  # 10
    ),
    "tests/train/test_repeated_paths.py": (
        "test_weights_that_were_tried_and_taken_back",  # 8
        "test_a_rate_that_was_tried_and_taken_back",  # 7
        "test_another_layout_for_a_while",  # 8
        "test_data_made_anew_before_their_stage_is_in_a_checkpoint",  # 4
    ),
    "tests/train/test_resume.py": (
        "test_a_run_killed_again_and_again_ends_with_the_same_bits[tensor2-zero3-bf16]",  # 23
        "test_a_run_killed_again_and_again_ends_with_the_same_bits[tensor2-zero1]",  # 14
        "test_a_run_killed_again_and_again_ends_with_the_same_bits[data2-zero3]",  # 13
        "test_a_run_goes_on_with_another_layout[data2-zero2 to tensor2-zero1]",  # 9
        "test_a_run_killed_again_and_again_ends_with_the_same_bits[data2-zero2]",  # 8
        "test_a_run_goes_on_with_another_layout[single to data2-zero3]",  # 7
        "test_a_run_killed_again_and_again_ends_with_the_same_bits[single]",  # 10
        "test_a_run_goes_on_with_another_layout[tensor2-zero1 to single]",  # 15
    ),
    "tests/train/test_stop.py": (
        "test_a_stop_asked_during[compilation]",  # 18
        "test_a_stop_asked_during[compilation at ZeRO 3]",  # 12
        "test_a_stop_asked_during[validation]",  # 11
        "test_ranks_stop_when_one_or_all_are_told_and_the_run_is_the_same",  # 14
    ),
    "tests/train/test_storage.py": (
        "test_a_disk_that_gets_full_is_74_and_nothing_is_lost",  # 7
        "test_74_is_started_again_and_counts",  # 9
        "test_a_save_without_room_is_told_and_a_stages_end_is_74[2]",  # 9
    ),
    "tests/train/test_suites.py": (
        "test_asking_gathers_weights_that_zero_3_has_cut_up",  # 16
        "test_asking_changes_no_step_and_scores_as_the_command_does",  # 14
    ),
    "tests/train/test_tensor_ranks.py": (
        "test_ranks_tell_once_what_one_process_tells[suite-tensor4]",  # 12
        "test_the_command_starts_its_ranks_and_one_tells_what_is_wrong",  # 23
        "test_ranks_tell_once_what_one_process_tells[held_out-tensor2]",  # 5
        "test_ranks_tell_once_what_one_process_tells[held_out-tensor4]",  # 9
    ),
    "tests/train/test_validation_on_context_ranks.py": (
        "test_every_rank_of_every_layout_has_the_score_of_one[tensor2-context2]",  # 6
    ),
    "tests/train/test_wrong_numbers.py": (
        "test_after_a_rewind_it_is_the_run_that_never_saw_the_data[step-6]",  # 21
        "test_a_spike_is_passed_over_on_all_ranks_and_told[tensor2]",  # 10
        "test_after_a_rewind_it_is_the_run_that_never_saw_the_data[stage-end]",  # 17
        "test_a_run_that_only_goes_back_is_given_up",  # 4
        "test_a_spike_is_passed_over_on_all_ranks_and_told[data2-zero2]",  # 9
    ),
}
