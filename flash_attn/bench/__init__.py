"""python -m flash_attn bench: this package's speed, memory and error beside what a user would pick instead.

suites.py declares the cases, impls.py what is measured, check.py and measure.py how, report.py and summary.py what
comes of it. Importing it starts nothing; benchmarks/plot.py draws from the JSON it writes.
"""
