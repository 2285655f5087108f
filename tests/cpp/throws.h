#pragma once

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <regex>
#include <string>

namespace schedulefree {

// Whether `f` throws, with a message in which `pattern` is found.
template <class F>
testing::AssertionResult throws(F&& f, const std::string& pattern) {
  std::string message;
  try {
    f();
    return testing::AssertionFailure() << "nothing was thrown";
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  } catch (const std::exception& error) {
    message = error.what();
  }
  std::replace(message.begin(), message.end(), '\n', ' ');
  if (std::regex_search(message, std::regex(pattern))) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "\"" << message << "\" was thrown, without \"" << pattern << "\"";
}

}  // namespace schedulefree
