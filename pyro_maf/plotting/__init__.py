r"""Figures of densities: samples, the noise of data, contours, losses, images.

Each function returns a matplotlib `Figure` that is not registered with pyplot: save it with `figure.savefig(path)`. At
the end of a notebook cell it is displayed. Compared models share axes. The colours, those of Okabe and Ito or of
cividis, are distinguishable for colour-blind readers. `title` is the title of the figure. Without the `plot` extra the
functions raise a ModuleNotFoundError.
"""

from pyro_maf.plotting.calibration import noise, pit, qq
from pyro_maf.plotting.densities import contours, log_densities, losses
from pyro_maf.plotting.samples import image_grid, marginals, pairs, scatter

__all__ = ["contours", "image_grid", "log_densities", "losses", "marginals", "noise", "pairs", "pit", "qq", "scatter"]
