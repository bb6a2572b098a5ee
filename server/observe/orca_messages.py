"""The messages of ORCA's load reports, as ``xds.data.orca.v3`` and ``xds.service.orca.v3`` publish them.

They are made here, in a pool of their own, since the package that has them (xds-protos) overwrites files of
other packages, those of ``google.api`` among them.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory

SERVICE = "xds.service.orca.v3.OpenRcaService"

_FIELD = descriptor_pb2.FieldDescriptorProto
_REPORT = "xds.data.orca.v3.OrcaLoadReport"
_REQUEST = "xds.service.orca.v3.OrcaLoadReportRequest"
_NUMBERS = {
    "cpu_utilization": 1,
    "mem_utilization": 2,
    "rps_fractional": 6,
    "eps": 7,
    "application_utilization": 9,
}
_MAPS = {"request_cost": 4, "utilization": 5, "named_metrics": 8}


def _report() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="xds/data/orca/v3/orca_load_report.proto", package="xds.data.orca.v3", syntax="proto3"
    )
    report = file.message_type.add(name="OrcaLoadReport")
    for name, number in _NUMBERS.items():
        report.field.add(name=name, number=number, type=_FIELD.TYPE_DOUBLE, label=_FIELD.LABEL_OPTIONAL)
    for name, number in _MAPS.items():
        entry = report.nested_type.add(name=name.title().replace("_", "") + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
        entry.field.add(name="value", number=2, type=_FIELD.TYPE_DOUBLE, label=_FIELD.LABEL_OPTIONAL)
        report.field.add(
            name=name,
            number=number,
            type=_FIELD.TYPE_MESSAGE,
            type_name=f".{_REPORT}.{entry.name}",
            label=_FIELD.LABEL_REPEATED,
        )
    return file


def _service() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="xds/service/orca/v3/orca.proto", package="xds.service.orca.v3", syntax="proto3"
    )
    file.dependency.extend(("xds/data/orca/v3/orca_load_report.proto", "google/protobuf/duration.proto"))
    request = file.message_type.add(name="OrcaLoadReportRequest")
    request.field.add(
        name="report_interval",
        number=1,
        type=_FIELD.TYPE_MESSAGE,
        type_name=".google.protobuf.Duration",
        label=_FIELD.LABEL_OPTIONAL,
    )
    request.field.add(
        name="request_cost_names", number=2, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_REPEATED
    )
    service = file.service.add(name="OpenRcaService")
    service.method.add(
        name="StreamCoreMetrics", input_type=f".{_REQUEST}", output_type=f".{_REPORT}", server_streaming=True
    )
    return file


POOL = descriptor_pool.DescriptorPool()
"""Where reflection finds the service."""

POOL.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
for _file in (_report(), _service()):
    POOL.Add(_file)

OrcaLoadReport: Any = message_factory.GetMessageClass(POOL.FindMessageTypeByName(_REPORT))
OrcaLoadReportRequest: Any = message_factory.GetMessageClass(POOL.FindMessageTypeByName(_REQUEST))
