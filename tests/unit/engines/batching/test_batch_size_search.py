"""Tests the search for the batch size: which sizes are tried, and which is chosen."""

from pathlib import Path

from engines.batching.autotune import BatchSizeSearch, TunedBatchSize, TuningStore, trial_texts


def try_out(speeds: dict[int, float], num_parts: int = 6, candidates: tuple[int, ...] = (256, 512, 1024)) -> list[int]:
    """Run all trials at these tokens a second; return the sizes tried, and then the one chosen."""
    trials = BatchSizeSearch(candidates, num_parts)
    tried = []
    while (tokens := trials.next_tokens) is not None:
        tried.append(tokens)
        trials.record(tokens, tokens / speeds[tokens])
    pace = trials.result()
    assert pace is not None
    return [*tried, pace.batch_tokens]


def test_every_size_is_tried_twice_and_the_smallest_near_the_best_is_taken() -> None:
    assert try_out({256: 3000, 512: 3500, 1024: 3550}) == [256, 512, 1024, 256, 512, 1024, 512]
    assert try_out({256: 3000, 512: 3300, 1024: 3600}, num_parts=24)[-1] == 1024


def test_a_layer_of_a_batch_does_not_hold_up_others_for_long() -> None:
    # 50 ms × 6 layers × 1,000 tokens/s.
    assert try_out({256: 900, 512: 1000, 1024: 1000})[-1] == 300


def test_on_a_device_that_does_not_pause_it_is_the_whole_batch() -> None:
    speeds = {2048: 60_000.0, 4096: 100_000.0, 8192: 150_000.0, 16384: 200_000.0}

    assert try_out(speeds, num_parts=1, candidates=tuple(speeds))[-1] == 10_000


def test_a_slow_model_is_tried_with_small_batches_only_and_keeps_a_size_that_is_worth_it() -> None:
    assert try_out({256: 100, 512: 100, 1024: 100}, num_parts=4) == [256, 128]


def test_the_better_of_two_trials_counts() -> None:
    trials = BatchSizeSearch((256,), 6)
    trials.record(256, 9.0)
    trials.record(256, 0.1)

    assert trials.result() == TunedBatchSize(256, 2560.0)


def test_without_any_trial_nothing_is_known() -> None:
    trials = BatchSizeSearch((256, 512), 6)
    trials.give_up()

    assert (trials.next_tokens, trials.result()) == (None, None)


def test_what_was_found_before_a_trial_failed_counts() -> None:
    trials = BatchSizeSearch((256, 512), 6)
    trials.record(256, 0.1)
    trials.give_up()

    assert trials.result() == TunedBatchSize(256, 2560.0)


def test_a_trial_is_made_of_texts_that_the_model_can_read() -> None:
    texts = trial_texts(512, vocab_size=100, max_tokens=20)

    assert [len(ids) for ids in texts] == [20] * 25
    assert all(0 <= ids.min() <= ids.max() < 100 for ids in texts)
    assert len(trial_texts(10, vocab_size=100, max_tokens=512)) == 1


def test_a_batch_size_is_stored_between_starts(tmp_path: Path) -> None:
    TuningStore(tmp_path).put("key", TunedBatchSize(512, 3000.0))
    TuningStore(tmp_path).put("other", TunedBatchSize(256, 1.0))

    assert TuningStore(tmp_path).get("key") == TunedBatchSize(512, 3000.0)
    assert TuningStore(tmp_path).get("unknown") is None


def test_without_a_folder_it_is_stored_until_the_process_ends() -> None:
    paces = TuningStore(None)
    paces.put("key", TunedBatchSize(512, 3000.0))

    assert paces.get("key") == TunedBatchSize(512, 3000.0)
