"""What candidates say and what judges make of it: prompts, generation, and judges that need no network.

Generating and judging are apart: responses are rows on disk, a judge reads them, and re-judging never regenerates.
Nothing here knows of plan or run.
"""
