"""The faults that fastmoco is made for, what happens then, and the tests that show it.

A test is "FILE::FUNCTION" below tests/. `python -m tests.faults.document` writes docs/reliability.md from this and from
the docstrings of the tests in tests/faults.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    fault: str
    outcome: str
    tests: tuple[str, ...]


MATRIX: dict[str, tuple[Row, ...]] = {
    "Stops and kills": (
        Row(
            "SIGTERM, SIGINT or SIGHUP",
            "the step ends, the state is saved, exit code 75; another signal, or the same after 2 s, ends at once",
            (
                "run/test_train.py::test_a_run_stopped_anywhere_resumes_bit_identically",
                "run/test_train.py::test_a_signal_to_the_group_of_a_launcher_saves",
                "run/test_train.py::test_a_second_signal_ends_at_once",
            ),
        ),
        Row(
            "SIGKILL at any moment",
            "the newest checkpoint that verifies is resumed, bit for bit; leftovers are deleted",
            (
                "run/test_train.py::test_a_run_killed_anywhere_resumes_from_its_last_checkpoint",
                "run/test_train.py::test_real_kills_and_signals",
                "run/test_checkpoint_faults.py::test_a_process_killed_during_a_save_always_leaves_a_valid_checkpoint",
                "benchmarks/test_soak.py::test_a_few_kills_lose_nothing",
            ),
        ),
        Row(
            "a rank is killed",
            "the others stop within --dist-timeout, and the run resumes exactly, with any number of ranks",
            (
                "distributed/test_distributed_train.py::test_a_rank_that_is_lost_ends_the_run_resumable",
                "distributed/test_distributed_launch.py::test_torchrun_restarts_a_run_that_lost_a_rank",
            ),
        ),
        Row(
            "a network link is cut",
            "both sides stop in time, and the run resumes",
            ("distributed/test_distributed_network.py::test_a_cut_link_ends_both_in_time_and_the_run_resumes",),
        ),
        Row(
            "a loader's process is killed",
            "exit code 3 at once, naming it; no other process waits for a lock that it held",
            ("pipelines/test_workers.py::test_a_killed_worker_holds_no_lock",),
        ),
    ),
    "Checkpoints": (
        Row(
            "the disk fills up during a save",
            "the earlier checkpoint stays, no partial file is left, training goes on; after three failures exit code 4",
            (
                "run/test_checkpoint_faults.py::test_a_full_disk_leaves_the_old_checkpoint_and_no_partial_file",
                "run/test_checkpoint.py::test_too_little_space_is_reported_before_writing",
            ),
        ),
        Row(
            "truncated, empty or random bytes",
            "`--resume` falls back to the one before, with a warning; given by name, exit code 4",
            (
                "run/test_checkpoint.py::test_truncated_lengthened_and_random_files_are_rejected",
                "run/test_checkpoint.py::test_newest_skips_corrupt_checkpoints_with_a_warning",
            ),
        ),
        Row("a flipped bit", "its SHA-256 refuses it", ("run/test_checkpoint.py::test_any_flipped_bit_is_rejected",)),
        Row(
            "another architecture or other settings",
            "exit code 4, with every difference by name",
            (
                "run/test_checkpoint.py::test_another_model_is_rejected_with_every_difference",
                "commands/test_cli.py::test_resuming_as_another_run_is_4_and_names_the_fields",
            ),
        ),
        Row(
            "code in a pickle; a small file that claims a huge tensor",
            "never executed; refused before memory is allocated",
            (
                "run/test_checkpoint.py::test_a_pickle_is_not_executed",
                "run/test_checkpoint.py::test_a_hostile_or_foreign_header_is_rejected_before_allocation",
                "backbones/test_read.py::test_nothing_executes",
                "backbones/test_pickles.py::test_nothing_is_called",
                "backbones/test_pickles.py::test_costs_are_bounded",
            ),
        ),
    ),
    "Images": (
        Row(
            "empty, damaged or truncated images, text under an image's name",
            "exit code 3, naming the file; with `--bad-images quarantine` a grey image in its place, and a list",
            (
                "pipelines/data/test_decode.py::test_a_bad_file_is_refused",
                "pipelines/data/test_quarantine.py::test_every_pipeline_replaces_it_by_grey",
                "commands/test_cli.py::test_a_bad_image_in_mid_training_is_3_and_training_resumes_once_it_is_fixed",
            ),
        ),
        Row(
            "a decompression bomb",
            "refused by its header, before decoding",
            ("pipelines/data/test_decode.py::test_a_bomb_is_refused_before_decoding",),
        ),
        Row(
            "16-bit grey, EXIF orientation, CMYK, palettes, alpha, animations",
            "the same RGB pixels on every backend",
            (
                "pipelines/data/test_decode.py::test_an_odd_file_decodes_to_its_pixels",
                "pipelines/data/test_decode.py::test_sixteen_bits_keep_their_high_byte",
                "pipelines/data/test_decode.py::test_orientation_is_undone_exactly",
            ),
        ),
        Row(
            "names with control characters",
            "escaped in messages",
            ("pipelines/data/test_decode.py::test_names_cannot_send_escapes_to_the_terminal",),
        ),
        Row(
            "no images, fewer than a batch, a queue larger than the data set",
            "exit code 2 or 3 at the start, with values that work",
            (
                "commands/test_cli.py::test_fewer_images_than_a_batch_is_2",
                "run/test_resolve.py::test_a_queue_larger_than_the_data_set_is_refused_unless_forced",
            ),
        ),
        Row(
            "links that form a cycle, unreadable folders, files that vanish",
            "each image is listed once; what cannot be read is named",
            (
                "pipelines/data/test_dataset.py::test_cyclic_links_list_every_file_once",
                "pipelines/data/test_dataset.py::test_an_unreadable_folder_is_named",
                "pipelines/data/test_dataset.py::test_a_file_that_changes_or_vanishes_is_named",
            ),
        ),
        Row(
            "truncated or hostile archives",
            "refused; nothing is extracted, so that no member can leave a folder",
            (
                "pipelines/data/test_tar_shards.py::test_a_shortened_archive_is_refused",
                "pipelines/data/test_tar_shards.py::test_links_and_devices_are_skipped_and_outside_paths_are_only_names",
            ),
        ),
        Row(
            "a damaged or unfinished .beton file",
            "refused before its images are used",
            ("pipelines/data/test_beton.py::test_damage_is_refused_in_one_line",),
        ),
        Row(
            "a converter meets a bad image, or is killed",
            "exit code 3 within seconds; what it leaves never looks complete",
            (
                "tools/test_make_ffcv.py::test_a_bad_image_is_exit_3_within_five_seconds",
                "tools/test_make_ffcv.py::test_a_killed_conversion_never_looks_complete",
            ),
        ),
    ),
    "Numbers and devices": (
        Row(
            "a loss or gradient that is not finite",
            "the step is skipped on all ranks before it changes anything; after 50 in a row, more than half of 50, or "
            "some at the end of the run, exit code 5",
            (
                "run/test_divergence.py::test_a_run_diverges_by_the_share_of_skipped_steps_or_by_how_it_ends",
                "run/test_divergence.py::test_a_last_epoch_that_diverges_fails_the_run",
                "step/test_step_parity.py::test_a_bad_batch_leaves_no_trace",
                "commands/test_cli.py::test_divergence_is_5_and_leaves_a_clean_checkpoint",
            ),
        ),
        Row(
            "DALI, FFCV or CUDA is asked for and missing",
            "exit code 2 or 6, with the command that installs it",
            (
                "commands/test_cli.py::test_cuda_without_cuda_is_6",
                "pipelines/backends/test_dali.py::test_missing_dali_is_named_with_its_install_command",
            ),
        ),
        Row(
            "too little device memory",
            "exit code 6 with a batch that may fit; the batch is never changed silently",
            ("standin/test_standin_selection.py::test_too_little_memory_for_any_way_is_an_error_of_one_line",),
        ),
        Row(
            "a fast path that is wrong on this device",
            "left out before training, in one line with the reason",
            (
                "tuning/test_select.py::test_the_next_one_is_taken_if_it_is_not",
                "tuning/test_select.py::test_everything_but_plain_pytorch_may_fail",
            ),
        ),
        Row(
            "a hostile configuration file",
            "exit code 2 in one line",
            ("config/test_config.py::test_a_damaged_or_hostile_file_is_refused_in_one_line",),
        ),
    ),
}
