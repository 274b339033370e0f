"""OpenPCDet's logger."""

import logging


def create_logger(log_file=None, rank=0, log_level=logging.INFO):
    logger = logging.getLogger(__name__)
    logger.setLevel(log_level if rank == 0 else 'ERROR')
    if log_file is not None:
        logger.addHandler(logging.FileHandler(filename=log_file))
    logger.propagate = False
    return logger
