"""Lets `pytest bench` know the rows: the hooks themselves are in `bench/plugin.py`."""

from bench.plugin import (  # noqa: F401
    measure,
    pytest_addoption,
    pytest_benchmark_update_machine_info,
    pytest_collect_file,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_generate_tests,
    pytest_terminal_summary,
)
