"""Kinds of faults that were wrong in silence: what happens now, and the tests that hold it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of fault; `tests` are `path::name` below tests/."""

    what: str
    now: str
    tests: tuple[str, ...]


KINDS = (
    Kind(
        "a served model under administration, threads and tasks",
        "an assignment belongs to its thread or task, memory to its last reader; what cannot run beside another waits or is refused",
        (
            "serving/test_state_machine.py::TestServing",
            "serving/test_callers.py::test_threads_draw_with_their_own_adapters",
            "serving/test_callers.py::test_asyncio_tasks_have_their_own",
            "serving/test_callers.py::test_a_replaced_and_a_dropped_adapter_live_on_where_they_are_assigned",
        ),
    ),
    Kind(
        "strength that lies outside the tensors",
        "PEFT folders, `adapter_config.json` beside a file and headers are applied or refused, at every door; saved files mean the "
        "same in the reader they are named for",
        (
            "io/test_strength.py::test_pefts_settings_give_what_peft_computes",
            "io/test_strength.py::test_a_folder_stands_wherever_a_file_does",
            "io/test_saved_for_diffusers.py::test_any_ranks_and_scales_in_a_kohya_file",
        ),
    ),
    Kind(
        "a gradient of a gradient",
        "exact in every backend, for groups, served layers, PEFT layers and regional attention",
        (
            "ops/test_twice.py::test_gradgradcheck",
            "ops/test_twice.py::test_a_gradient_penalty_reaches_every_operand",
            "ops/test_twice.py::test_regional_attention",
            "peft/test_accelerate_twice.py::test_gradient_of_a_gradient_is_pefts",
            "peft/test_accelerate_twice.py::test_gradient_of_a_gradient_through_a_group_is_its_layers",
        ),
    ),
    Kind(
        "scalars of any dtype, and keys that a converter drops",
        "alpha is read in any dtype, 0-dim or [1]; every key is applied, or named and refused",
        (
            "io/test_accounting.py::test_alpha_of_every_dtype_and_form",
            "io/test_accounting.py::test_no_unknown_ending_vanishes",
        ),
    ),
    Kind(
        "names that our own tables could read, lost in a converter",
        "the model's own dotted and flat names first, under every prefix and ending; only foreign names are converted",
        (
            "io/test_every_spelling.py::test_own_names_under_every_prefix",
            "io/test_every_spelling.py::test_mixed_spellings_in_one_file",
        ),
    ),
    Kind(
        "two spellings of one layer",
        "merging gives the weighted sum, or a refusal before the first byte",
        (
            "io/test_merge_dialects.py::test_the_weighted_sum_or_a_refusal",
            "io/test_merge_dialects.py::test_another_family_is_refused_before_anything_is_written",
            "experts/test_checks.py::test_identity_of_a_layer_is_not_its_spelling",
        ),
    ),
    Kind(
        "state dicts of a patched model",
        "the base's names and tensors both ways; `save_pretrained` warns; `Handle.bake` ends a patch with the mixture in the weights",
        (
            "patching/test_state_dicts.py::test_names_and_tensors_are_the_base_s",
            "patching/test_state_dicts.py::test_a_checkpoint_of_the_base_loads_into_the_patched_model",
            "patching/test_state_dicts.py::test_a_control_net_and_averages_see_the_base",
            "patching/test_state_dicts.py::test_baked_for_good",
        ),
    ),
    Kind(
        "strength per component",
        "components and blocks in diffusers' shapes, in `set_scales`, `patch` and `serve`; any other shape is refused in words",
        (
            "patching/test_component_scales.py::test_by_component_and_by_block",
            "patching/test_component_scales.py::test_any_shape_is_taken_whole_or_refused_in_words",
            "serving/test_callers.py::test_block_scales_of_a_unet",
        ),
    ),
    Kind(
        "unequal ranks in blocks that are compiled one by one",
        "as many graphs as with equal ranks; nothing is padded in eager execution",
        (
            "patching/test_block_ranks.py::test_as_many_graphs_as_with_equal_ranks",
            "patching/test_block_ranks.py::test_flux_s_57_blocks",
            "patching/test_block_ranks.py::test_nothing_is_padded_in_eager_execution",
        ),
    ),
    Kind(
        "layers counted as accelerated that are not",
        "offloaded adapters are fused; every layer says what its next call does, and one warning names the reasons",
        (
            "peft/test_accelerate_report.py::test_the_handle_says_what_the_next_call_does",
            "peft/test_accelerate_report.py::test_other_adapters_are_named",
            "peft/test_accelerate_hooks.py::test_computes_while_the_tensors_are_there_and_gives_them_back",
            "patching/test_handles.py::test_a_cast_in_the_middle_of_training_rounds_nothing_that_trains",
        ),
    ),
    Kind(
        "files that are something else",
        "a Git LFS pointer, an embedding, a list, a cut file and a flat pickle are named as such, with a next step that works",
        (
            "io/test_accounting.py::test_files_of_other_kinds_are_named",
            "io/test_accounting.py::test_pickles_of_other_kinds_are_named",
            "io/test_accounting.py::test_a_wan_file_for_two_transformers_says_where_it_went",
            "files/test_words.py::test_a_file_cut_anywhere_is_refused_by_name",
        ),
    ),
    Kind(
        "an install that replaces torch, or does not go together",
        "no upper bound on torch; `doctor` names packages that clash; without a compiler plain torch computes",
        (
            "build/test_packaging.py::test_a_newer_torch_stays",
            "cli/test_clashes.py::test_a_peft_too_old_for_transformers_is_named",
            "build/test_setup.py::test_without_a_compiler_it_installs_and_says_so",
        ),
    ),
    Kind(
        "guidance by two calls, and several outputs per prompt",
        "routes are read from what the pipeline did, told, or refused",
        (
            "serving/test_pipelines.py::test_two_prompts_of_two_outputs",
            "serving/test_pipelines.py::test_the_order_is_what_the_pipeline_made",
            "serving/test_pipelines.py::test_what_is_read_of_every_pipeline_that_loads_loras",
        ),
    ),
    Kind(
        "one handle in several threads",
        "no scale is lost; experts are off until the last of overlapping blocks ends",
        (
            "patching/test_switches.py::TestSwitching",
            "patching/test_switches.py::test_no_scale_that_a_thread_sets_is_lost",
            "patching/test_switches.py::test_blocks_of_two_threads_that_overlap",
        ),
    ),
    Kind(
        "tests that hold on one kind of processor, or hold nothing",
        "no bits are asked where the order of a sum is the processor's; planted faults in swaps, names, gates, resumed data and "
        "function transforms are noticed; figures in README come out of result files",
        (
            "kernels/test_routing.py::test_the_gradient_of_a_given_gate_of_any_shape",
            "backends/test_gate_extremes.py::test_a_given_gate_in_any_layout",
            "backends/test_gate_extremes.py::test_gates_all_but_closed_or_open",
            "ops/test_direct.py::test_function_transforms_never_take_the_eager_road",
            "patching/test_swap_order.py::test_a_swap_is_a_fresh_patch",
            "io/test_every_spelling.py::test_ambiguous_flat_names_are_refused",
            "benchmarks/test_readme_figures.py::test_the_table_of_layers",
        ),
    ),
    Kind(
        "smaller ones",
        "a dripping server ends at a deadline, an echoed key stays out of messages, line separators inside texts are kept, an absurd "
        "rank is refused before its data is read, shards behind the hub's links are read, NaN in memory is refused, a handle is found again",
        (
            "methods/test_selma_deadline.py::test_a_dripping_server_is_left_at_the_deadline",
            "methods/test_selma_deadline.py::test_a_key_that_is_echoed_stays_out_of_messages_tracebacks_and_logs",
            "methods/test_selma_files.py::test_a_run_whose_seeds_hold_unicodes_line_ends_goes_on",
            "io/test_accounting.py::test_a_huge_rank_is_refused_before_its_data_are_read",
            "files/test_words.py::test_shards_behind_the_links_of_the_hubs_cache",
            "files/test_words.py::test_read_errors_have_words",
            "experts/test_checks.py::test_values_that_are_not_finite_are_refused",
            "patching/test_handles.py::test_found_again_from_the_module_the_pipeline_and_what_holds_them",
        ),
    ),
)


def rows() -> list[str]:
    """The table's rows for docs/robustness.md."""
    return [
        f"| {kind.what} | {kind.now} | {', '.join(f'`{test}`' for test in kind.tests)} |" for kind in KINDS
    ]
