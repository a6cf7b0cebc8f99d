"""Tests of many seconds whose subject others cover in part: `make test-long` runs them, and so does
continuous integration. By file: a test's name, with an id where only that case is long.

Seconds are processor time on the two-core development machine. To be named here, a test has cheaper
neighbours in `make test`, which fail where the same thing breaks on a simpler layout.
"""

LONG = {
    "tests/test_demo_path.py": ("test_from_raw_text_to_a_lengthened_context",),  # 119
    "tests/test_hostile_input.py": ("test_a_hostile_path_is_refused_in_one_line_by[train {run}]",),
    "tests/benchmarks/test_gpu_call.py": (
        "test_steps_run_here_through_the_engine_and_a_peer_that_fails_is_a_line",  # 47
    ),
    "tests/benchmarks/test_gpu_call_wheels.py": (
        "test_what_is_marked_gpu_is_collected_with_what_such_a_machine_has",  # 56
    ),
    "tests/benchmarks/test_peer.py": ("test_the_comparison_runs_and_keeps_its_figures",),  # 16
    "tests/checkpoint/test_resume_on_layouts.py": (
        "test_every_layout_goes_on_where_another_stopped",  # 60
        "test_context_ranks_go_on_where_others_stopped",  # 29
    ),
    "tests/checkpoint/test_in_training.py": (
        "test_kills_at_any_moment_of_a_run_that_always_saves",
    ),
    "tests/data_prep/test_tokenize.py": (
        "test_job_killed_at_any_moment_ends_with_the_same_bytes",  # 15, and minutes of waiting
    ),
    "tests/gpu/test_commands.py": (
        "test_a_run_in_bf16_is_stopped_and_gone_on_with_to_the_bit_evaluated_and_sampled[cpu]",
    ),
    "tests/model/test_kernels.py": ("test_flex_on_cpu_equals_the_reference_without_gradients",),
    "tests/model/test_kernels_before.py": ("test_flex_on_cpu_gives_the_last_rows",),  # 20
    "tests/model/test_selftest_across_ranks.py": (
        "test_every_fault_is_refused_on_all_ranks_in_the_same_words[bf16-names1]",
    ),
    "tests/parity/test_context_compiled.py": (
        "test_a_step_through_compiled_regions_is_the_step_as_written",  # 12
    ),
    "tests/parity/test_context_engine.py": (
        "test_five_steps_equal_the_plain_training_loop[ranks8]",  # 17
    ),
    "tests/parity/test_context_layers.py": (
        "test_loss_and_every_gradient_equal_the_plain_model[tensor2-context4]",  # 50
        "test_loss_and_every_gradient_equal_the_plain_model[tensor1-context4]",  # 22
    ),
    "tests/parity/test_engine.py": ("test_five_steps_equal_the_plain_training_loop[ranks8]",),  # 20
    "tests/parity/test_layers.py": (
        "test_loss_and_every_gradient_equal_the_plain_model[tensor4]",  # 55
    ),
    "tests/parity/test_trainer.py": (
        "test_what_is_planted_in_a_run_is_seen",  # 42
        "test_a_run_with_changing_rates_equals_the_plain_training_loop[ranks2]",  # 22
    ),
    "tests/report/test_damaged_run.py": ("test_one_wrong_value_anywhere_is_one_line_or_a_page",),
    "tests/train/test_anneal.py": (
        "test_a_run_resumed_at_and_inside_a_change_is_the_run_that_was_not_interrupted[tensor2-zero3]",
    ),
    "tests/train/test_context_features.py": (
        "test_what_is_served_gives_the_run_of_one_rank[spike]",  # 16
    ),
    "tests/train/test_launcher.py": (
        "test_a_launch_through_stops_and_kills_is_the_run_that_had_none",  # 31
    ),
    "tests/train/test_resume.py": (
        "test_a_run_killed_again_and_again_ends_with_the_same_bits[tensor2-zero3-bf16]",  # 23
        "test_a_run_killed_again_and_again_ends_with_the_same_bits[tensor2-zero1]",  # 14
        "test_a_run_killed_again_and_again_ends_with_the_same_bits[data2-zero3]",  # 13
    ),
    "tests/train/test_stop.py": (
        "test_a_stop_asked_during[compilation]",  # 18
        "test_a_stop_asked_during[compilation at ZeRO 3]",  # 12
    ),
    "tests/train/test_tensor_ranks.py": (
        "test_ranks_tell_once_what_one_process_tells[suite-tensor4]",  # 12
    ),
    "tests/train/test_wrong_numbers.py": (
        "test_after_a_rewind_it_is_the_run_that_never_saw_the_data[step-6]",  # 21
    ),
}
