"""The names and arguments of other libraries' losses over these kernels: change the import and nothing else.

They compute what those libraries compute, their conventions included. None of the libraries has to be installed.
"""

from . import kornia, monai, nnunet, smp

__all__ = ["kornia", "monai", "nnunet", "smp"]
