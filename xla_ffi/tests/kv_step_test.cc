// The metadata of a step is checked against what is mapped, before anybody acts on it.
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "fixtures.h"
#include "kv/step.h"

namespace ellm {
namespace {

constexpr int32_t kSpansAt = 8;

// Metadata with these spans, and so many words at the end that mean other things.
std::vector<int32_t> pack(const std::vector<SequenceSpan>& spans, int32_t rows, size_t more = 5) {
  std::vector<int32_t> words(kSpansAt + spans.size() * 4 + more, -7);
  const StepHeader header{1, static_cast<int32_t>(spans.size()), rows, kSpansAt};
  std::memcpy(words.data(), &header, sizeof header);
  if (!spans.empty()) {
    std::memcpy(words.data() + kSpansAt, spans.data(), spans.size() * sizeof spans[0]);
  }
  return words;
}

Status check(const KvCache& kv, const std::vector<int32_t>& words) {
  const auto view = view_step(words.data(), words.size());
  return view.ok() ? check_step(kv, view.value()) : view.status();
}

// Slot 0 holds 24 tokens, slot 1 none.
std::shared_ptr<KvCache> cache_with_24_tokens() {
  const auto kv = make_cache(make_pool(host_driver(), 64 * page_bytes()), page_layout(2, 80));
  const int32_t slot = kv->take_slot(0).value();
  CHECK_EQ(slot, 0);
  REQUIRE_OK(extend(*kv, {slot}, {20}));
  CHECK_EQ(kv->mapped_tokens(0), 24);
  return kv;
}

TEST(a_step_may_touch_what_is_mapped_to_the_token) {
  const auto kv = cache_with_24_tokens();
  CHECK_OK(check(*kv, pack({}, 0)));
  CHECK_OK(check(*kv, pack({{0, 0, 0, 24}}, 24)));
  CHECK_OK(check(*kv, pack({{0, 23, 3, 1}, {1, 0, 4, 0}}, 4)));
  const Status s = check(*kv, pack({{1, 0, 0, 0}, {0, 20, 0, 5}}, 5));
  CHECK_EQ(s.code(), Code::kNotMapped);
  CHECK(s.message().find("slot 0 is to hold tokens 20 to 25 but only 24 tokens are mapped") !=
        std::string::npos);
  CHECK_EQ(check(*kv, pack({{1, 0, 0, 1}}, 1)).code(), Code::kNotMapped);
  CHECK_EQ(check(*kv, pack({{0, INT32_MAX, 0, 1}}, 1)).code(), Code::kNotMapped);
}

TEST(spans_that_make_no_sense_are_refused) {
  const auto kv = cache_with_24_tokens();
  const SequenceSpan wrong[] = {{-1, 0, 0, 1}, {2, 0, 0, 1}, {0, -1, 0, 1},        {0, 0, -1, 1},
                                {0, 0, 0, -1}, {0, 0, 8, 1}, {0, 0, INT32_MAX, 24}};
  for (const SequenceSpan& span : wrong) {
    const Status s = check(*kv, pack({{0, 0, 0, 1}, span}, 8));
    CHECK_EQ(s.code(), Code::kInvalid);
    CHECK(s.message().find("sequence 1") != std::string::npos);
  }
}

TEST(metadata_that_is_too_short_is_refused) {
  const auto kv = cache_with_24_tokens();
  const std::vector<int32_t> words = pack({{0, 0, 0, 4}, {0, 4, 4, 4}}, 8, 0);
  for (size_t n = 0; n < words.size(); ++n) {
    CHECK_EQ(view_step(words.data(), n).status().code(), Code::kInvalid);
  }
  CHECK_OK(check(*kv, words));
  for (size_t field = 1; field < 4; ++field) {
    for (const int32_t value : {-1, INT32_MIN, INT32_MAX}) {
      std::vector<int32_t> changed = words;
      changed[field] = value;
      if (field == 2 && value > 0) continue;  // Many rows are fine.
      CHECK_EQ(check(*kv, changed).code(), Code::kInvalid);
    }
  }
}

// Whatever the words are, they are read inside of their bounds, or refused.
TEST(random_words_do_no_harm) {
  const auto kv = cache_with_24_tokens();
  std::mt19937_64 random(check::seed);
  int fine = 0;
  for (int round = 0; round < 20000; ++round) {
    std::vector<int32_t> words(random() % 40);
    for (int32_t& word : words) {
      word = static_cast<int32_t>(random() % 3 == 0 ? random() : random() % 12);
    }
    fine += check(*kv, words).ok();
  }
  CHECK(fine > 0);
}

}  // namespace
}  // namespace ellm
