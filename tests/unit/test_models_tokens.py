"""What a stage knows from the token ids alone."""

import torch

from tessera.models.codec import TokenTable
from tessera.models.presets import tiny_spec


def filled(pairs: int) -> TokenTable:
    spec = tiny_spec()
    table = TokenTable(spec.model_copy(update={"codec": spec.codec.model_copy(update={"pairs": pairs})}))
    for seed, parameter in enumerate(table.parameters()):
        parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
    return table


def test_what_is_known_depends_on_the_last_tokens_and_on_no_other() -> None:
    """The convolution looks back by three tokens; without it, the hashed table by one."""
    table, ids = filled(1024), torch.arange(20, 30)[None]
    short = filled(1024)
    assert short.taps is not None
    short.taps.data.zero_()
    for changed in range(10):
        other = ids.clone()
        other[0, changed] += 100
        for known, back in ((table, 3), (short, 1)):
            differs = (known(other) != known(ids)).any(-1)[0].nonzero().flatten().tolist()
            assert differs == list(range(changed, min(10, changed + back + 1)))


def test_history_stands_for_the_text_before() -> None:
    table, ids = filled(64), torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(table(ids[:, 4:], skip=3), table(ids)[:, 7:])
    nothing = torch.full((2, 3), -1)
    torch.testing.assert_close(table(torch.cat((nothing, ids), 1), skip=3), table(ids))


def test_hashed_tables_start_at_zero() -> None:
    """So stages that know them start from the same function as stages that do not."""
    spec = tiny_spec()
    with_pairs = spec.model_copy(update={"codec": spec.codec.model_copy(update={"pairs": 64})})
    ids = torch.arange(9)[None]
    assert torch.equal(TokenTable(spec)(ids), TokenTable(with_pairs)(ids))


def test_pairs_spread_over_all_rows() -> None:
    table = filled(64)
    table(torch.randint(0, 300, (8, 200), generator=torch.Generator().manual_seed(1))).sum().backward()
    assert table.pairs is not None
    assert table.pairs.grad is not None
    assert bool((table.pairs.grad.abs().sum(-1) > 0).all())
