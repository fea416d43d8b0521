from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Adjustment(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADJUSTMENT_NONE: _ClassVar[Adjustment]
    ADJUSTMENT_LIMITED: _ClassVar[Adjustment]
    ADJUSTMENT_HELD: _ClassVar[Adjustment]
    ADJUSTMENT_CENTERED: _ClassVar[Adjustment]
ADJUSTMENT_NONE: Adjustment
ADJUSTMENT_LIMITED: Adjustment
ADJUSTMENT_HELD: Adjustment
ADJUSTMENT_CENTERED: Adjustment

class GetSpecRequest(_message.Message):
    __slots__ = ("policy", "version")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    policy: str
    version: str
    def __init__(self, policy: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class GetSpecResponse(_message.Message):
    __slots__ = ("spec_json", "max_batch_size", "server_version")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    max_batch_size: int
    server_version: str
    def __init__(self, spec_json: _Optional[str] = ..., max_batch_size: _Optional[int] = ..., server_version: _Optional[str] = ...) -> None: ...

class ActRequest(_message.Message):
    __slots__ = ("policy", "version", "request_id", "rows", "obs", "seeds", "deterministic", "noise", "client_id", "priority")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    OBS_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    version: str
    request_id: int
    rows: int
    obs: bytes
    seeds: _containers.RepeatedScalarFieldContainer[int]
    deterministic: bool
    noise: bytes
    client_id: str
    priority: int
    def __init__(self, policy: _Optional[str] = ..., version: _Optional[str] = ..., request_id: _Optional[int] = ..., rows: _Optional[int] = ..., obs: _Optional[bytes] = ..., seeds: _Optional[_Iterable[int]] = ..., deterministic: bool = ..., noise: _Optional[bytes] = ..., client_id: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class ActResponse(_message.Message):
    __slots__ = ("request_id", "version", "rows", "action", "q", "seeds", "timing", "error", "adjusted")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ADJUSTED_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    version: str
    rows: int
    action: bytes
    q: bytes
    seeds: _containers.RepeatedScalarFieldContainer[int]
    timing: Timing
    error: Error
    adjusted: _containers.RepeatedScalarFieldContainer[Adjustment]
    def __init__(self, request_id: _Optional[int] = ..., version: _Optional[str] = ..., rows: _Optional[int] = ..., action: _Optional[bytes] = ..., q: _Optional[bytes] = ..., seeds: _Optional[_Iterable[int]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., adjusted: _Optional[_Iterable[_Union[Adjustment, str]]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_us", "batch_us", "compute_us", "batch_rows")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    queue_us: float
    batch_us: float
    compute_us: float
    batch_rows: int
    def __init__(self, queue_us: _Optional[float] = ..., batch_us: _Optional[float] = ..., compute_us: _Optional[float] = ..., batch_rows: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...
