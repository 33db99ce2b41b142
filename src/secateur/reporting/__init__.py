"""The report of a pre-training run: figures, numbers and one self-contained HTML page. Read-only over a run folder.

run_data.py reads the folder, numbers.py computes, words.py says it, figures_*.py draw it, gallery.py lists the
figures, page.py makes the page and write.py the files.
"""
