"""What a Triton model configuration may say, and its text: one table of fields, written and read by protobuf.

The table holds, in the order in which they are written, the fields of `serving.triton` and those that people add to
them, such as accelerators of ONNX Runtime. In the text form a field is its name, so its number plays no part.
Source: the message `inference.ModelConfig` of Triton's model_config.proto; a test compares both.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format

__all__ = ["DATA_TYPES", "ENUMS", "MESSAGES", "config_from_text", "config_text"]

DATA_TYPES: Mapping[str, str] = {
    "BOOL": "TYPE_BOOL", "UINT8": "TYPE_UINT8", "UINT16": "TYPE_UINT16", "UINT32": "TYPE_UINT32",
    "UINT64": "TYPE_UINT64", "INT8": "TYPE_INT8", "INT16": "TYPE_INT16", "INT32": "TYPE_INT32", "INT64": "TYPE_INT64",
    "FLOAT16": "TYPE_FP16", "FLOAT": "TYPE_FP32", "DOUBLE": "TYPE_FP64", "STRING": "TYPE_STRING",
    "BFLOAT16": "TYPE_BF16",
}  # fmt: skip
"""ONNX's name of an element type -> Triton's."""

ENUMS: Mapping[str, tuple[str, ...]] = {
    "DataType": ("TYPE_INVALID", *DATA_TYPES.values()),
    "Format": ("FORMAT_NONE", "FORMAT_NHWC", "FORMAT_NCHW"),
    "Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
    "TimeoutAction": ("REJECT", "DELAY"),
    "ModelPriority": ("PRIORITY_DEFAULT", "PRIORITY_MAX", "PRIORITY_MIN"),
}

MESSAGES: Mapping[str, Mapping[str, str]] = {
    "ModelConfig": {
        "name": "string", "platform": "string", "backend": "string", "runtime": "string",
        "default_model_filename": "string", "cc_model_filenames": "map string", "max_batch_size": "int32",
        "input": "repeated Input", "output": "repeated Output",
        "ensemble_scheduling": "Ensembling", "dynamic_batching": "DynamicBatching",
        "instance_group": "repeated InstanceGroup", "model_warmup": "repeated Warmup",
        "version_policy": "VersionPolicy", "optimization": "Optimization",
        "model_transaction_policy": "TransactionPolicy", "response_cache": "ResponseCache",
        "metric_tags": "map string", "parameters": "map Parameter",
    },
    "VersionPolicy": {"latest": "Latest", "all": "All", "specific": "Specific"},
    "Latest": {"num_versions": "uint32"},
    "All": {},
    "Specific": {"versions": "repeated int64"},
    "Reshape": {"shape": "repeated int64"},
    "Input": {
        "name": "string", "data_type": "DataType", "format": "Format", "dims": "repeated int64", "reshape": "Reshape",
        "is_shape_tensor": "bool", "allow_ragged_batch": "bool", "optional": "bool",
    },
    "Output": {
        "name": "string", "data_type": "DataType", "dims": "repeated int64", "reshape": "Reshape",
        "label_filename": "string", "is_shape_tensor": "bool",
    },
    "Optimization": {
        "graph": "Graph", "priority": "ModelPriority", "cuda": "Cuda", "execution_accelerators": "Accelerators",
        "input_pinned_memory": "Switch", "output_pinned_memory": "Switch", "gather_kernel_buffer_threshold": "uint32",
        "eager_batching": "bool",
    },
    "Graph": {"level": "int32"},
    "Cuda": {"graphs": "bool", "busy_wait_events": "bool", "output_copy_stream": "bool"},
    "Accelerators": {
        "gpu_execution_accelerator": "repeated Accelerator", "cpu_execution_accelerator": "repeated Accelerator",
    },
    "Accelerator": {"name": "string", "parameters": "map string"},
    "Switch": {"enable": "bool"},
    "QueuePolicy": {
        "timeout_action": "TimeoutAction", "default_timeout_microseconds": "uint64", "allow_timeout_override": "bool",
        "max_queue_size": "uint32",
    },
    "DynamicBatching": {
        "preferred_batch_size": "repeated int32", "max_queue_delay_microseconds": "uint64", "preserve_ordering": "bool",
        "priority_levels": "uint64", "default_priority_level": "uint64", "default_queue_policy": "QueuePolicy",
    },
    "InstanceGroup": {
        "name": "string", "kind": "Kind", "count": "int32", "gpus": "repeated int32", "profile": "repeated string",
        "passive": "bool", "host_policy": "string",
    },
    "Ensembling": {"step": "repeated Step", "max_inflight_requests": "uint32"},
    "Step": {
        "model_name": "string", "model_version": "int64", "input_map": "map string", "output_map": "map string",
    },
    "Parameter": {"string_value": "string"},
    "Warmup": {"name": "string", "batch_size": "uint32", "inputs": "map WarmupInput", "count": "uint32"},
    "WarmupInput": {
        "data_type": "DataType", "dims": "repeated int64", "zero_data": "bool", "random_data": "bool",
        "input_data_file": "string",
    },
    "TransactionPolicy": {"decoupled": "bool"},
    "ResponseCache": {"enable": "bool"},
}  # fmt: skip
"""Message -> its fields and their types. The key of a map is a string."""

SCALARS = {
    name: getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name.upper()}")
    for name in ("string", "bool", "int32", "int64", "uint32", "uint64")
}


def config_text(config: Mapping[str, Any], header: str) -> str:
    """The text of a configuration given as plain types by the names of `MESSAGES`, below a comment."""
    message = json_format.ParseDict(dict(config), _config_type()())
    return f"{header}\n{text_format.MessageToString(message, as_utf8=True)}"


def config_from_text(text: str) -> Any:
    """The protobuf message of a configuration. Raises ValueError, with line and column, for what is none."""
    message = _config_type()()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise ValueError(str(error).replace(f'Message type "{_PACKAGE}.', 'Message type "')) from error
    return message


_PACKAGE = "cnx_deploy.triton"


@cache
def _config_type() -> Any:
    """The class of the message `ModelConfig`, made of the tables."""
    file = descriptor_pb2.FileDescriptorProto(name="cnx_deploy/triton.proto", package=_PACKAGE, syntax="proto2")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field_name, kind) in enumerate(fields.items(), start=1):
            _add_field(message, name, field_name, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.ModelConfig"))


def _add_field(message: Any, message_name: str, name: str, number: int, kind: str) -> None:
    *words, kind = kind.split()
    field = message.field.add(name=name, number=number, json_name=name)
    field.label = field.LABEL_REPEATED if words else field.LABEL_OPTIONAL
    if words == ["map"]:  # protobuf's own way to say it: a repeated message of key and value
        entry_name = "".join(part.capitalize() for part in name.split("_")) + "Entry"
        entry = message.nested_type.add(name=entry_name)
        entry.options.map_entry = True
        _add_field(entry, entry_name, "key", 1, "string")
        _add_field(entry, entry_name, "value", 2, kind)
        field.type, field.type_name = field.TYPE_MESSAGE, f".{_PACKAGE}.{message_name}.{entry_name}"
    elif kind in SCALARS:
        field.type = SCALARS[kind]
    else:
        field.type = field.TYPE_ENUM if kind in ENUMS else field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{kind}"
