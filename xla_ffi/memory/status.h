// Outcomes as values: the memory core neither throws nor aborts.
#pragma once

#include <string>
#include <utility>
#include <variant>

namespace ellm {

enum class Code {
  kOk,
  kInvalid,      // The caller asked for something that makes no sense; nothing changed.
  kOutOfMemory,  // A limit stands in the way; nothing changed, waiting or freeing helps.
  kDriver,       // The system refused; what had been done was undone.
  kBroken,       // The system refused, and undoing it failed too: some memory is in doubt.
  kNotMapped,    // What is to be touched has no memory; nothing was touched.
};

// A code and, unless it is kOk, a message: what was asked, what there is, one remedy.
class [[nodiscard]] Status {
 public:
  static Status Ok() { return Status(Code::kOk, {}); }
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  Code code() const { return code_; }
  const std::string& message() const { return message_; }
  bool ok() const { return code_ == Code::kOk; }

 private:
  Code code_;
  std::string message_;
};

// A value, or the Status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::move(value)) {}         // NOLINT: implicit on purpose
  Result(Status status) : held_(std::move(status)) {}  // NOLINT: `status` must not be ok

  bool ok() const { return std::holds_alternative<T>(held_); }
  Status status() const { return ok() ? Status::Ok() : std::get<Status>(held_); }
  T& value() { return std::get<T>(held_); }
  const T& value() const { return std::get<T>(held_); }

 private:
  std::variant<T, Status> held_;
};

}  // namespace ellm
