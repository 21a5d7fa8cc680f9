"""Pages about runs and models, each one self-contained HTML file: report, compare, diagnose."""
