"""What did a pre-training run do? Figures, numbers and one HTML page, made from its folder.

Nothing of the run is changed. run_data.py reads the folder, numbers.py computes, words.py says it, figures_*.py draw
it, gallery.py lists the figures, page.py makes the page and write.py the files.
"""
