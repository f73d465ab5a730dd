"""Records (records.py) on GPUs: a record is where its words lie, and reading a field loads it there and then.

Kernel code has more than a hundred such fields. As values they would all be alive at once, and take the registers from
the tile GEMM's sums; as loads they cost a hit in the first-level cache.
"""

from __future__ import annotations

from .cuda_api import (
    AttributeTemplate,
    core_models,
    element_pointer,
    intrinsic,
    ir,
    lowering_registry,
    make_array,
    populate_array,
    register_model,
    types,
    typing_registry,
)


class RecordType(types.Type):
    """Where a record lies whose fields are those of a named tuple type."""

    def __init__(self, tuple_type):
        self.tuple_type = tuple_type
        super().__init__(name=f"RecordAt({tuple_type})")

    @property
    def instance_class(self):
        return self.tuple_type.instance_class


@register_model(RecordType)
class _RecordModel(core_models.PrimitiveModel):
    def __init__(self, manager, record_type):
        super().__init__(manager, record_type, ir.IntType(64).as_pointer())


def num_words(field):
    """Words of a field of this type."""
    if isinstance(field, types.BaseTuple):
        return sum(map(num_words, field.types))
    return 2 if isinstance(field, types.Array) else 1


def _find(record_type, name):
    """(type, first word) of a field, or None."""
    fields = record_type.tuple_type.fields
    if name not in fields:
        return None
    position = fields.index(name)
    return record_type.tuple_type.types[position], sum(map(num_words, record_type.tuple_type.types[:position]))


@typing_registry.register_attr
class _FieldTyping(AttributeTemplate):
    key = RecordType

    def generic_resolve(self, record_type, name):
        found = _find(record_type, name)
        if found is None:
            return None
        return RecordType(found[0]) if isinstance(found[0], types.BaseTuple) else found[0]


@lowering_registry.lower_getattr_generic(RecordType)
def _load_field(context, builder, record_type, record, name):
    field_type, at = _find(record_type, name)

    def word(i):
        return builder.gep(record, [ir.IntType(64)(i)])

    if isinstance(field_type, types.BaseTuple):
        return word(at)
    if isinstance(field_type, types.Float):
        bits = builder.trunc(builder.load(word(at)), ir.IntType(field_type.bitwidth))
        return builder.bitcast(bits, context.get_value_type(field_type))
    if not isinstance(field_type, types.Array):
        return context.cast(builder, builder.load(word(at)), types.int64, field_type)
    array = make_array(field_type)(context, builder)
    item = context.get_constant(types.intp, field_type.dtype.bitwidth // 8)
    data = builder.inttoptr(builder.load(word(at)), array.data.type)
    populate_array(array, data, [builder.load(word(at + 1))], [item], item, None)
    return array._getvalue()


@intrinsic
def record_at(typing, words, at, like):
    """The record of the type of `like` that begins at `words[at]`."""

    def codegen(context, builder, sig, args):
        return element_pointer(context, builder, sig.args[0], args[0], args[1])

    record_type = like if isinstance(like, RecordType) else RecordType(like)
    return record_type(words, types.intp, like), codegen
