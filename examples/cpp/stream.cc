// Streams a bundle on a device: ONNX Runtime's C API and a bundle's manifest.json, no Python.
//
//   stream BUNDLE (--prompt TEXT | --ids "1 2 3") [--max-tokens N] [--ops LIBRARY] [--threads N]
//
// Decodes greedily: the prompt in chunks, then one token a run. The state never leaves its buffers: there are
// two sets of them and two IO bindings, one reads set 0 and writes set 1, the other the reverse.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr uint32_t kApiVersion = 18;  // everything below is older; every later library still answers to it
constexpr size_t kPromptChunk = 512;  // bounds the memory that a long prompt's activations take
const char* const kUsage = "usage: stream BUNDLE (--prompt TEXT | --ids \"1 2 3\") [--max-tokens N] ...";
const char* const kKeepInput = "logits_to_keep";

const OrtApi* ort = nullptr;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string text = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error("ONNX Runtime: " + text);
}

// A handle of ONNX Runtime that is released with its scope: Handle<OrtEnv, &OrtApi::ReleaseEnv>.
template <class T, auto Release>
struct Releaser {
  void operator()(T* handle) const { (ort->*Release)(handle); }
};
template <class T, auto Release>
using Handle = std::unique_ptr<T, Releaser<T, Release>>;
using Env = Handle<OrtEnv, &OrtApi::ReleaseEnv>;
using Options = Handle<OrtSessionOptions, &OrtApi::ReleaseSessionOptions>;
using Session = Handle<OrtSession, &OrtApi::ReleaseSession>;
using MemoryInfo = Handle<OrtMemoryInfo, &OrtApi::ReleaseMemoryInfo>;
using Binding = Handle<OrtIoBinding, &OrtApi::ReleaseIoBinding>;
using Value = Handle<OrtValue, &OrtApi::ReleaseValue>;

// Calls one of the API's functions whose last argument receives a new handle.
template <class Owner, class Function, class... Arguments>
Owner make(Function function, Arguments... arguments) {
  typename Owner::pointer raw = nullptr;
  check((ort->*function)(arguments..., &raw));
  return Owner(raw);
}

// A tensor whose memory is ours; ONNX Runtime reads and writes it in place.
class Tensor {
 public:
  Tensor(const std::string& dtype, std::vector<int64_t> shape) : shape_(std::move(shape)) {
    const bool whole = dtype == "int64";
    if (!whole && dtype != "float32") throw std::runtime_error("a tensor of type " + dtype);
    const auto kind = whole ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    bytes_ = whole ? 8 : 4;
    for (const int64_t dim : shape_) bytes_ *= static_cast<size_t>(dim);
    size_t room = bytes_ + kAlignment;
    data_.resize(room);
    start_ = data_.data();
    std::align(kAlignment, bytes_, start_, room);
    static const MemoryInfo cpu =
        make<MemoryInfo>(&OrtApi::CreateCpuMemoryInfo, OrtDeviceAllocator, OrtMemTypeDefault);
    value_ = make<Value>(&OrtApi::CreateTensorWithDataAsOrtValue, cpu.get(), start_, bytes_, shape_.data(),
                         shape_.size(), kind);
  }
  template <class T>
  T* data() const { return static_cast<T*>(start_); }
  const OrtValue* value() const { return value_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 64;
  std::vector<int64_t> shape_;
  std::vector<unsigned char> data_;
  size_t bytes_;
  void* start_;
  Value value_;
};

using Arguments = std::map<std::string, std::string>;

int number(const Arguments& arguments, const std::string& key) {
  std::istringstream word(arguments.at(key));
  int value;
  if (word >> value && value >= 0 && word.eof()) return value;
  throw std::runtime_error(key + " takes a number, 0 or more");
}

// manifest.json, refused if this program can't run what it describes.
Json read_manifest(const std::string& folder) {
  std::ifstream file(folder + "/manifest.json");
  if (!file) throw std::runtime_error(folder + " is not a bundle: it has no manifest.json");
  Json manifest = Json::parse(file);
  const Json& model = manifest.at("model");
  const auto refuse = [](std::string why) { throw std::runtime_error("can't stream this bundle: " + why); };
  if (manifest.at("schema_version") != 1) refuse("its manifest is of another version");
  if (manifest.at("graph_form") != "dynamic") refuse("its graphs have fixed lengths");
  if (model.value("form", "chunk") != "chunk") refuse("the model reads whole sequences");
  if (model.at("input").at("kind") != "tokens") refuse("the model reads features");
  const std::string graph = manifest.at("graph");
  if (graph.empty() || graph == ".." || graph.find_first_of("/\\:") != std::string::npos) {
    refuse("the path of its graph leaves the folder");
  }
  return manifest;
}

// One stream: the session, the state before and after a run, and the bindings between them.
class Stream {
 public:
  Stream(const Arguments& arguments, const Json& manifest)
      : vocab_(manifest.at("model").at("vocab_size")),
        env_(make<Env>(&OrtApi::CreateEnv, ORT_LOGGING_LEVEL_ERROR, "stream")),
        token_("int64", {1, 1}),
        keep_("int64", {1}),
        logits_("float32", {1, 1, vocab_}) {
    const Json& limit = manifest.at("model").at("max_tokens");
    limit_ = limit.is_null() ? -1 : limit.get<int64_t>();
    input_ = manifest.at("model").at("input").at("name");
    for (const Json& tensor : manifest.at("inputs")) keeps_ = keeps_ || tensor.at("name") == kKeepInput;
    *keep_.data<int64_t>() = 1;
    open(arguments, manifest);
    for (const Json& row : manifest.at("state")) add_state(row, 0), add_state(row, 1);
    for (const int side : {0, 1}) bind(side, manifest.at("state"));
  }

  // Feeds ids and returns the logits [V] after the last one.
  const float* feed(const int64_t* ids, size_t count) {
    if (limit_ >= 0 && position_ + static_cast<int64_t>(count) > limit_) {
      throw std::runtime_error("the model's stream ends after " + std::to_string(limit_) + " tokens");
    }
    if (count == 1) step(*ids);
    else chunk(ids, count);
    position_ += static_cast<int64_t>(count);
    side_ ^= 1;
    return logits_.data<float>();
  }

  bool full() const { return position_ == limit_; }

 private:
  void open(const Arguments& arguments, const Json& manifest) {
    Options options = make<Options>(&OrtApi::CreateSessionOptions);
    check(ort->SetIntraOpNumThreads(options.get(), number(arguments, "--threads")));
    const Json config = manifest.at("target_row").value("session_options", Json::object());
    for (const auto& entry : config.items()) {
      const std::string value = entry.value();
      check(ort->AddSessionConfigEntry(options.get(), entry.key().c_str(), value.c_str()));
    }
    const std::string& ops = arguments.at("--ops");
    void* handle = nullptr;  // stays loaded: sessions point into it
    if (!ops.empty()) check(ort->RegisterCustomOpsLibrary(options.get(), ops.c_str(), &handle));
    const std::string path = arguments.at("bundle") + "/" + manifest.at("graph").get<std::string>();
    session_ = make<Session>(&OrtApi::CreateSession, env_.get(), path.c_str(), options.get());
  }

  void add_state(const Json& row, int side) {
    std::vector<int64_t> shape;
    for (const Json& dim : row.at("shape")) shape.push_back(dim.is_string() ? 1 : dim.get<int64_t>());  // B
    state_[side].emplace_back(row.at("dtype"), shape);
    const Tensor& tensor = state_[side].back();
    if (row.at("dtype") == "float32") std::fill_n(tensor.data<float>(), tensor.bytes() / 4, row.at("init"));
    else std::fill_n(tensor.data<int64_t>(), tensor.bytes() / 8, row.at("init").get<int64_t>());
  }

  // The state from set `side` into the other one; a single token; its logits.
  void bind(int side, const Json& rows) {
    binding_[side] = make<Binding>(&OrtApi::CreateIoBinding, session_.get());
    OrtIoBinding* binding = binding_[side].get();
    for (size_t i = 0; i < rows.size(); ++i) {
      const std::string name = rows[i].at("name"), output = rows[i].at("output");
      check(ort->BindInput(binding, name.c_str(), state_[side][i].value()));
      check(ort->BindOutput(binding, output.c_str(), state_[side ^ 1][i].value()));
    }
    if (keeps_) check(ort->BindInput(binding, kKeepInput, keep_.value()));
    bind_call(side, token_, logits_);
  }

  void bind_call(int side, const Tensor& ids, const Tensor& logits) {
    check(ort->BindInput(binding_[side].get(), input_.c_str(), ids.value()));
    check(ort->BindOutput(binding_[side].get(), "logits", logits.value()));
  }

  void step(int64_t id) {
    *token_.data<int64_t>() = id;
    check(ort->RunWithBinding(session_.get(), nullptr, binding_[side_].get()));
  }

  void chunk(const int64_t* ids, size_t count) {
    const auto length = static_cast<int64_t>(count);
    const Tensor tokens("int64", {1, length});
    const Tensor all("float32", {1, keeps_ ? 1 : length, vocab_});
    std::copy_n(ids, count, tokens.data<int64_t>());
    bind_call(side_, tokens, all);
    check(ort->RunWithBinding(session_.get(), nullptr, binding_[side_].get()));
    bind_call(side_, token_, logits_);
    std::copy_n(all.data<float>() + (all.bytes() / 4 - vocab_), vocab_, logits_.data<float>());
  }

  int64_t vocab_, limit_ = -1, position_ = 0;
  bool keeps_ = false;
  std::string input_;
  Env env_;
  Session session_;
  Tensor token_, keep_, logits_;
  std::vector<Tensor> state_[2];
  Binding binding_[2];
  int side_ = 0;
};

std::vector<int64_t> prompt_ids(const Arguments& arguments, bool bytes, int64_t vocab) {
  std::vector<int64_t> ids;
  if (!arguments.at("--ids").empty()) {
    std::istringstream words(arguments.at("--ids"));
    for (int64_t id; words >> id;) ids.push_back(id);
    if (!words.eof()) throw std::runtime_error("--ids takes whole numbers between spaces");
  } else if (bytes) {
    for (const char letter : arguments.at("--prompt")) ids.push_back(static_cast<unsigned char>(letter));
  } else {
    throw std::runtime_error("this example knows no tokenizer but bytes: give the prompt as --ids \"1 2 3\"");
  }
  if (ids.empty()) throw std::runtime_error("the prompt is empty");
  const auto [least, most] = std::minmax_element(ids.begin(), ids.end());
  if (*least < 0 || *most >= vocab) throw std::runtime_error("ids go from 0 to " + std::to_string(vocab - 1));
  return ids;
}

void generate(const Arguments& arguments, const Json& manifest) {
  const int64_t vocab = manifest.at("model").at("vocab_size"), wanted = number(arguments, "--max-tokens");
  const bool bytes = manifest.at("tokenizer").at("kind") == "bytes";
  const int64_t known = bytes ? std::min<int64_t>(vocab, 256) : vocab;
  const std::vector<int64_t> prompt = prompt_ids(arguments, bytes, vocab);
  auto began = Clock::now();
  const auto seconds = [&began] { return std::chrono::duration<double>(Clock::now() - began).count(); };
  Stream stream(arguments, manifest);
  std::fprintf(stderr, "opened in %.3f s\n", seconds());

  began = Clock::now();
  const float* logits = nullptr;
  for (size_t at = 0; at < prompt.size(); at += kPromptChunk) {
    logits = stream.feed(&prompt[at], std::min(kPromptChunk, prompt.size() - at));
  }
  std::fprintf(stderr, "prompt: %zu tokens, %.1f tokens/s\n", prompt.size(), prompt.size() / seconds());

  began = Clock::now();
  int64_t made = 0;
  while (made < wanted) {
    const int64_t id = std::max_element(logits, logits + known) - logits;
    bytes ? std::putchar(static_cast<int>(id)) : std::printf("%lld ", static_cast<long long>(id));
    std::fflush(stdout);
    made += 1;
    if (stream.full()) break;
    logits = stream.feed(&id, 1);
  }
  std::printf("\n");
  std::fprintf(stderr, "generated: %lld tokens, %.1f tokens/s%s\n", static_cast<long long>(made),
               made / seconds(), stream.full() ? "; the stream is full" : "");
}

Arguments parse(int count, char** words) {
  Arguments all = {
      {"--prompt", ""}, {"--ids", ""}, {"--ops", ""}, {"--max-tokens", "100"}, {"--threads", "0"}};
  if (count < 2 || count % 2 != 0) throw std::runtime_error(kUsage);
  for (int i = 2; i < count; i += 2) {
    if (all.count(words[i]) == 0) throw std::runtime_error(std::string("unknown argument ") + words[i]);
    all[words[i]] = words[i + 1];
  }
  all["bundle"] = words[1];
  return all;
}

}  // namespace

int main(int count, char** words) {
  try {
    const Arguments arguments = parse(count, words);
    ort = OrtGetApiBase()->GetApi(kApiVersion);
    if (ort == nullptr) throw std::runtime_error("ONNX Runtime is older than 1.18");
    generate(arguments, read_manifest(arguments.at("bundle")));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
