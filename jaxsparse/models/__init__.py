"""Flax models as the papers of the field have them."""

from jaxsparse.models.lenet import LeNet5Caffe, LeNet300100

__all__ = ["LeNet5Caffe", "LeNet300100"]
