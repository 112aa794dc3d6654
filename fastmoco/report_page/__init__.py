"""One HTML page on one run or several: files of runs → figures, charts and pictures → page."""
