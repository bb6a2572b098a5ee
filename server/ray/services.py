"""The services that Ray's proxy offers."""

from __future__ import annotations

from grpc_health.v1 import health_pb2

from longspan.v1 import encoder_pb2, inference_pb2

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
)
"""Their descriptors. Ray calls methods by their names alone, which are different in these services."""

WATCH = "/grpc.health.v1.Health/Watch"
"""Is not offered: a stream without an end would keep its replica from ending."""
