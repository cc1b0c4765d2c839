#include "program.h"

#include <stdexcept>

namespace xexport {
namespace {

// Larger figures than any model has; they keep every product of two within 64 bits.
constexpr int64_t kMost = int64_t{1} << 28;

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("the attribute program is not valid: ") + what);
}

class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& numbers) : numbers_(numbers) {}
  int64_t next(int64_t least, int64_t beyond, const char* what) {
    require(at_ < numbers_.size(), "it ends too early");
    const int64_t value = numbers_[at_++];
    require(value >= least && value < beyond, what);
    return value;
  }
  int64_t size(const char* what) { return next(0, kMost, what); }
  bool flag() { return next(0, 2, "a flag") != 0; }
  bool at_end() const { return at_ == numbers_.size(); }

 private:
  const std::vector<int64_t>& numbers_;
  size_t at_ = 0;
};

int64_t length(const std::vector<float>& list) { return static_cast<int64_t>(list.size()); }
template <class T>
int64_t length(const std::vector<T>& list) { return static_cast<int64_t>(list.size()); }

Port read_port(Reader& in) {
  Port port{static_cast<PortKind>(in.next(1, 7, "the kind of a port")), {}, 1};
  port.shape.resize(static_cast<size_t>(in.next(0, 7, "the rank of a port")));
  for (int64_t& dim : port.shape) {
    dim = in.next(1, kMost, "a dimension");
    port.width *= dim;
    require(port.width < kMost, "a row is too wide");
  }
  return port;
}

bool is_binary(RowOp op) { return op >= RowOp::add && op <= RowOp::min; }

}  // namespace

RowProgram::RowProgram(const std::vector<int64_t>& numbers, std::vector<float> constants)
    : literals(std::move(constants)) {
  Reader in(numbers);
  in.next(1, 2, "this library reads version 1");
  int64_t counts[6];
  for (int64_t& count : counts) count = in.next(0, 4096, "a count");
  registers = in.size("registers");
  depth = in.next(0, 64, "depth");
  for (int64_t i = 0; i < counts[0]; ++i) {
    inputs.push_back(read_port(in));
    require(inputs.back().kind <= PortKind::history, "the kind of an input");
  }
  for (int64_t i = 0; i < counts[1]; ++i) {
    outputs.push_back(read_port(in));
    require(outputs.back().kind == PortKind::output || outputs.back().kind == PortKind::tail, "the kind of an output");
  }
  for (int64_t i = 0; i < counts[2]; ++i) {
    Place p{static_cast<PortKind>(in.next(0, 8, "the kind of a place")), in.size("index"), in.size("width"), in.size("offset")};
    int64_t room = 0;
    switch (p.kind) {
      case PortKind::reg: room = registers; break;
      case PortKind::rows:
      case PortKind::tokens:
      case PortKind::fixed:
        require(p.index < length(inputs) && inputs[static_cast<size_t>(p.index)].kind == p.kind, "a place of no input");
        room = inputs[static_cast<size_t>(p.index)].width;
        break;
      case PortKind::output:
        require(p.index < length(outputs) && outputs[static_cast<size_t>(p.index)].kind == p.kind, "a place of no output");
        room = outputs[static_cast<size_t>(p.index)].width;
        break;
      case PortKind::literal:
        require(p.index < length(literals), "a place of no literal");
        room = 1;
        break;
      default: require(false, "the kind of a place");
    }
    require(p.offset + p.width <= room, "a place beyond its row");
    places.push_back(p);
  }
  const int64_t n = length(places);
  for (int64_t k = 0; k < counts[3]; ++k) {
    RowInstruction i{};
    i.op = static_cast<RowOp>(in.next(0, static_cast<int64_t>(RowOp::count), "an operation"));
    i.dst = in.next(0, n, "a destination");
    i.a = in.next(0, n, "an operand");
    i.b = in.next(-1, n, "an operand");
    i.c = in.next(-1, n, "an operand");
    i.outer = in.next(1, kMost, "outer");
    i.inner = in.next(1, kMost, "inner");
    i.a_single = in.flag();
    i.a_step = in.size("a step");
    i.b_single = in.flag();
    i.b_step = in.size("a step");
    const auto width = [&](int64_t place) { return places[static_cast<size_t>(place)].width; };
    const Place& to = places[static_cast<size_t>(i.dst)];
    require(to.kind == PortKind::reg || to.kind == PortKind::output, "a destination that can't be written");
    const bool reduces = i.op >= RowOp::sum && i.op <= RowOp::l2;
    const bool norm = i.op == RowOp::layer_norm || i.op == RowOp::rms_norm;
    int64_t read = i.outer * i.inner, written = reduces ? i.outer : i.outer * i.inner;
    if (is_binary(i.op)) {
      require(i.b >= 0, "an operand is missing");
      read = (i.outer - 1) * i.a_step + (i.a_single ? 1 : i.inner);
      require((i.outer - 1) * i.b_step + (i.b_single ? 1 : i.inner) <= width(i.b), "an operand beyond its place");
    } else if (i.op == RowOp::pick) {
      read = (i.outer - 1) * i.a_step + (i.inner - 1) * i.b_step + 1;
    } else if (i.op == RowOp::place) {
      written = (i.outer - 1) * i.b_step + i.inner;
    } else if (!reduces && !norm) {
      require(i.outer == 1, "outer");
      if (i.op == RowOp::mul_add) {
        require(i.b >= 0 && i.c >= 0 && i.inner <= width(i.b) && i.inner <= width(i.c), "an operand is missing");
      }
    } else if (norm) {
      require(i.b >= 0 && i.inner <= width(i.b) && (i.c < 0 || i.inner <= width(i.c)), "a norm's weight");
      require(i.a_step < length(literals), "a norm's epsilon");
    }
    require(read <= width(i.a), "an operand beyond its place");
    require(written <= to.width, "a result beyond its place");
    instructions.push_back(i);
  }
  for (int64_t k = 0; k < counts[4]; ++k) {
    const RowShift s{in.next(0, n, "a shift"), in.next(0, length(inputs), "a history"), in.size("offset"), in.size("width")};
    require(inputs[static_cast<size_t>(s.history)].kind == PortKind::history, "a history");
    require(inputs[static_cast<size_t>(s.history)].width == s.width && s.offset + s.width <= registers, "a shift's width");
    require(s.width <= places[static_cast<size_t>(s.source)].width, "a shift's source");
    shifts.push_back(s);
  }
  for (int64_t k = 0; k < counts[5]; ++k) {
    const RowTail t{in.next(0, n, "a tail"), in.next(0, length(outputs), "a tail's output"), in.size("width")};
    const Port& to = outputs[static_cast<size_t>(t.output)];
    require(to.kind == PortKind::tail && to.width == t.width, "a tail's output");
    require(t.width <= places[static_cast<size_t>(t.source)].width, "a tail's source");
    tails.push_back(t);
  }
  require(in.at_end(), "it goes on behind its end");
  bool any = false;
  for (const Port& port : inputs) any = any || port.kind == PortKind::rows;
  require(any, "no input has rows");
}

}  // namespace xexport
