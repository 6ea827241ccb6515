"""Which tests can see a fault in which file: the fastest first, since the first failure ends a mutant's run."""

from __future__ import annotations

# How many mutants of each part the fixed sample has.
PARTS = {
    "rmoe/routing": 115,
    "rmoe/model": 60,
    "rmoe/analysis": 57,
    "rmoe/compare/statistics.py": 34,
    "rmoe/training/checkpoint.py": 34,
}
# A table whose every line a golden file repeats: its mutants would only flatter the rate.
LEFT_OUT = ("rmoe/routing/zoo.py",)
# Left to the suite: they compile for seconds, or start processes that know nothing of the mutant.
_SLOW = (
    "recompilation",
    "test_compiled",
    "one_graph",
    "fresh_process",
    "pip_install",
    "set_the_peak",
    "two_ranks",
)
NOT_SLOW = f"not ({' or '.join(_SLOW)})"

_CONTRACT = "tests/contract/test_contract.py"
_NAIVE = f"{_CONTRACT}::test_equals_the_naive_reference"
_ROUTING = (
    "tests/routing/test_mechanisms.py",
    "tests/routing/test_training_state.py",
    "tests/routing/test_composition.py",
    _NAIVE,
)
_GATES = (
    *_ROUTING,
    "tests/routing/test_gate.py",
    "tests/routing/test_threshold_gates.py",
    "tests/routing/test_peers.py",
)
_OPTIONS = (
    *_ROUTING,
    "tests/routing/test_gate.py",
    "tests/routing/test_zoo_docs.py",
    f"{_CONTRACT}::test_golden",
    "tests/model/test_configuration.py",
)
_WHOLE = (
    "tests/model/test_blocks.py",
    "tests/model/test_folders.py",
    "tests/model/test_padding_and_generation.py",
    "tests/model/test_saving.py",
    "tests/model/test_variants.py",
    "tests/model/test_head.py",
    "tests/model/test_configuration.py",
    "tests/routing/test_training_state.py",
)
_FOLDERS = ("tests/model/test_folders.py", "tests/model/test_saving.py")
_EDGES = "tests/analysis/test_edges.py"
_INSIGHT = "tests/analysis/test_insight.py"
_ANALYSES = ("tests/analysis/test_rmoe.py", "tests/analysis/test_command.py")

# The longest entry that a file's path begins with counts.
TESTS: dict[str, tuple[str, ...]] = {
    "rmoe/routing/": _ROUTING,
    "rmoe/routing/gate.py": _GATES,
    "rmoe/routing/other_gates.py": _GATES,
    "rmoe/routing/threshold_gates.py": _GATES,
    "rmoe/routing/null_experts.py": _GATES,
    "rmoe/routing/quantile_balance.py": _GATES,
    "rmoe/routing/router.py": (*_ROUTING, "tests/routing/test_cross_layer.py"),
    "rmoe/routing/zero_experts.py": _GATES,
    "rmoe/routing/model_routers.py": (*_GATES, "tests/routing/test_shipped.py"),
    "rmoe/routing/cross_layer.py": (*_ROUTING, "tests/routing/test_cross_layer.py"),
    "rmoe/routing/losses.py": (*_ROUTING, "tests/routing/test_peers.py"),
    "rmoe/routing/balance.py": (*_ROUTING, "tests/routing/test_peers.py"),
    "rmoe/routing/recurrence.py": (
        "tests/routing/test_reference.py",
        "tests/routing/test_recurrence.py",
        *_ROUTING,
        f"{_CONTRACT}::test_shapes_and_dtypes",
    ),
    "rmoe/routing/cells.py": (
        "tests/routing/test_reference.py",
        "tests/routing/test_recurrence.py",
        *_ROUTING,
        f"{_CONTRACT}::test_shapes_and_dtypes",
    ),
    "rmoe/routing/gru_cpu.py": ("tests/routing/test_reference.py", *_ROUTING),
    "rmoe/routing/scorer.py": (*_ROUTING, f"{_CONTRACT}::test_shapes_and_dtypes"),
    "rmoe/routing/cosine.py": (*_ROUTING, f"{_CONTRACT}::test_shapes_and_dtypes"),
    "rmoe/routing/initial.py": (*_ROUTING, f"{_CONTRACT}::test_shapes_and_dtypes"),
    "rmoe/routing/token_routers.py": (*_ROUTING, f"{_CONTRACT}::test_gradients_reach_what_they_should"),
    "rmoe/routing/describe.py": ("tests/routing/test_zoo_docs.py", "rmoe/routing/describe.py"),
    "rmoe/routing/options.py": _OPTIONS,
    "rmoe/routing/spec.py": _OPTIONS,
    "rmoe/model/": _WHOLE,
    "rmoe/model/competition.py": ("tests/model/test_competition.py",),
    "rmoe/model/coupling.py": ("tests/model/test_coupling.py",),
    "rmoe/model/dense_gradients.py": ("tests/model/test_dense_gradients.py",),
    "rmoe/model/layers.py": (*_WHOLE, "tests/model/test_dense_gradients.py", "tests/model/test_coupling.py"),
    "rmoe/model/modeling_rmoe.py": (*_WHOLE, "tests/routing/test_cross_layer.py"),
    "rmoe/model/updates.py": (*_WHOLE, "tests/moe/test_callbacks.py"),
    "rmoe/model/card.py": ("tests/model/test_card.py",),
    "rmoe/model/configuration_rmoe.py": (
        "tests/model/test_configuration.py",
        "tests/model/test_blocks.py",
        "tests/model/test_dense_gradients.py",
    ),
    "rmoe/model/experts.py": ("tests/model/test_experts.py", "tests/model/test_blocks.py"),
    "rmoe/model/head.py": ("tests/model/test_head.py", "tests/model/test_blocks.py"),
    "rmoe/model/initialize.py": (
        "tests/model/test_configuration.py",
        *_ROUTING[:1],
        "tests/model/test_blocks.py",
    ),
    "rmoe/model/loading.py": _FOLDERS,
    "rmoe/model/norm.py": ("tests/model/test_blocks.py", "tests/model/test_variants.py"),
    "rmoe/model/auto_code.py": _FOLDERS,
    "rmoe/model/weights.py": _FOLDERS,
    "rmoe/analysis/": (_EDGES, "tests/analysis/test_measures.py", *_ANALYSES),
    "rmoe/analysis/analyze.py": (_EDGES, *_ANALYSES, _INSIGHT, "tests/moe/test_check.py"),
    "rmoe/analysis/balance.py": (_EDGES, "tests/analysis/test_balance.py"),
    "rmoe/analysis/contexts.py": (_EDGES, _INSIGHT),
    "rmoe/analysis/contribution.py": (_EDGES, "tests/analysis/test_contribution.py"),
    "rmoe/analysis/insight.py": (_EDGES, _INSIGHT, *_ANALYSES),
    "rmoe/analysis/load.py": (_EDGES, "tests/analysis/test_measures.py", _INSIGHT, *_ANALYSES),
    "rmoe/analysis/measures.py": (_EDGES, "tests/analysis/test_measures.py", _INSIGHT, *_ANALYSES),
    "rmoe/analysis/probe.py": (_EDGES, _INSIGHT),
    "rmoe/analysis/regret.py": (_EDGES, "tests/analysis/test_regret.py"),
    "rmoe/analysis/saturation.py": (_EDGES, "tests/analysis/test_measures.py", _INSIGHT, *_ANALYSES),
    "rmoe/analysis/streaming/": ("tests/analysis/test_streaming.py",),
    "rmoe/analysis/tracing.py": ("tests/analysis/test_tracing.py",),
    "rmoe/analysis/command.py": (
        _EDGES,
        "tests/analysis/test_command.py",
        "tests/analysis/test_tracing.py",
        "tests/analysis/test_streaming.py",
    ),
    "rmoe/analysis/gradients.py": (_EDGES, "tests/analysis/test_gradients.py"),
    "rmoe/analysis/mutual_information.py": (_EDGES, "tests/analysis/test_mutual_information.py"),
    "rmoe/analysis/reading.py": _ANALYSES[1:],
    "rmoe/analysis/token_text.py": _ANALYSES,
    "rmoe/moe/": (_EDGES, "tests/moe/test_families.py", "tests/moe/test_recorder.py", *_ANALYSES),
    "rmoe/compare/statistics.py": (
        "tests/compare/test_definitions.py",
        "rmoe/compare/statistics.py",
        "tests/compare/test_statistics.py",
        "tests/compare/test_sequential.py",
    ),
    "rmoe/training/checkpoint.py": ("tests/training/test_checkpoint.py",),
}


def selection(file: str) -> tuple[str, ...]:
    """Arguments for pytest: the entry's tests, and the file's own doctests."""
    tests = TESTS[max((entry for entry in TESTS if file.startswith(entry)), key=len)]
    return tests if file in tests else (*tests, file)
