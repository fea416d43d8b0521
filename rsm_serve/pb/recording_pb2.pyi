from rsm_serve.pb import policy_pb2 as _policy_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Record(_message.Message):
    __slots__ = ("policy", "version", "method", "client_id", "arrived_unix_ns", "rows", "obs", "seeds", "noise", "noise_shape", "code", "reason", "action", "q", "adjusted", "policy_action", "timing", "total_us")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    OBS_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    NOISE_SHAPE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    ADJUSTED_FIELD_NUMBER: _ClassVar[int]
    POLICY_ACTION_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    policy: str
    version: str
    method: str
    client_id: str
    arrived_unix_ns: int
    rows: int
    obs: bytes
    seeds: _containers.RepeatedScalarFieldContainer[int]
    noise: bytes
    noise_shape: _containers.RepeatedScalarFieldContainer[int]
    code: str
    reason: str
    action: bytes
    q: bytes
    adjusted: _containers.RepeatedScalarFieldContainer[_policy_pb2.Adjustment]
    policy_action: bytes
    timing: _policy_pb2.Timing
    total_us: float
    def __init__(self, policy: _Optional[str] = ..., version: _Optional[str] = ..., method: _Optional[str] = ..., client_id: _Optional[str] = ..., arrived_unix_ns: _Optional[int] = ..., rows: _Optional[int] = ..., obs: _Optional[bytes] = ..., seeds: _Optional[_Iterable[int]] = ..., noise: _Optional[bytes] = ..., noise_shape: _Optional[_Iterable[int]] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., action: _Optional[bytes] = ..., q: _Optional[bytes] = ..., adjusted: _Optional[_Iterable[_Union[_policy_pb2.Adjustment, str]]] = ..., policy_action: _Optional[bytes] = ..., timing: _Optional[_Union[_policy_pb2.Timing, _Mapping]] = ..., total_us: _Optional[float] = ...) -> None: ...
