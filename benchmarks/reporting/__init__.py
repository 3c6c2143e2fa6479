"""From rows of a result file to tables, bars, plots and the generated parts of README.md and docs/benchmarks.md."""
