"""Order of blocks: a permutation per (seed, epoch), the same whatever the number of processes or restarts."""

from hypothesis import given
from hypothesis import strategies as st

from rmoe.data import BlockSampler, epoch_order
from rmoe.data.order import block_number

SEEDS = st.integers(0, 2**64 - 1)


@given(num_blocks=st.integers(1, 300), seed=SEEDS, epoch=st.integers(0, 10**9))
def test_each_epoch_reads_every_block_once(num_blocks: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(num_blocks, seed, epoch).tolist()) == list(range(num_blocks))


@given(num_blocks=st.integers(30, 300), seed=st.integers(0, 2**64 - 2), epoch=st.integers(0, 10**9))
def test_epochs_and_seeds_differ(num_blocks: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_blocks, seed, epoch).tolist()
    assert order != epoch_order(num_blocks, seed, epoch + 1).tolist()
    assert order != epoch_order(num_blocks, seed + 1, epoch).tolist()


def test_order_is_the_same_for_ever() -> None:
    # Golden: a change here changes every run, and no old run could be resumed or repeated.
    assert epoch_order(12, seed=0, epoch=0).tolist() == [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]
    assert epoch_order(12, seed=7, epoch=3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1, 11, 10]


def test_order_cannot_be_spoilt_by_a_caller() -> None:
    assert not epoch_order(5, 0, 0).flags.writeable


@given(num_blocks=st.integers(1, 50), seed=SEEDS, stop=st.integers(1, 300), data=st.data())
def test_resuming_goes_on_where_it_stopped(
    num_blocks: int, seed: int, stop: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, stop))
    whole = BlockSampler(num_blocks, seed, stop=stop)
    rest = BlockSampler(num_blocks, seed, start=start, stop=stop)
    assert list(whole)[start:] == list(rest)
    assert len(rest) == stop - start
    assert list(whole) == [block_number(num_blocks, seed, example) for example in range(stop)]


def test_without_an_end_the_sampler_stops_with_the_epoch() -> None:
    assert list(BlockSampler(10, 3, start=14)) == epoch_order(10, 3, 1)[4:].tolist()
